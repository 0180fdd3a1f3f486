"""Claims of the family analysis."""
