"""Measurements of models, of maps, and of what attention costs."""
