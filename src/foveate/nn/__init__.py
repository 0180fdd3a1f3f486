"""Trainable layers: mechanisms of kind "module"."""
