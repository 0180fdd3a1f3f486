"""What touches a live transformers model: loading, and the built-in model and text."""
