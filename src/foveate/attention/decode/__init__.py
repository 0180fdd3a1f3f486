"""Attention made for decoding over a long cache."""
