"""Measurements of models, of maps, and of what attention costs."""

from foveate.analysis.base import Record, load_record, rank_heads

__all__ = ["Record", "load_record", "rank_heads"]
