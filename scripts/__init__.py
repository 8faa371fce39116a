"""Tools beside the trainer, each with one job; they import train.py, which imports nothing of theirs."""
