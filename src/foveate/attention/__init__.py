"""Mechanisms of kind "attention": q, k, v -> out."""
