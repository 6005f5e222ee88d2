"""Which parts and which losses of FineLIP help: short training runs from one start, ``finelip study ablation``."""
