"""Layers that read sparsely."""
