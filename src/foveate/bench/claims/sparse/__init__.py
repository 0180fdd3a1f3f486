"""Claims of sparse attention."""
