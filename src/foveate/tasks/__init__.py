"""Synthetic tasks and the small training loop."""
