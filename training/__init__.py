"""Training: losses, data loading, one training loop (``python training/train.py --help``)."""
