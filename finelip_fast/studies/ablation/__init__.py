"""Ablation of FineLIP's parts and losses by short training runs from one start: ``finelip study ablation``."""
