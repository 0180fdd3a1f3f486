"""Sparse attention for prefill and decoding."""
