"""Mechanisms of kind "cache": what a KV cache stores."""
