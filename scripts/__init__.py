"""Companions of train.py, each with one job. They import it; it never imports them."""
