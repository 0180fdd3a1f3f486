"""Layers made for cheap decoding."""
