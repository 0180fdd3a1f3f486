"""Everything that measures: comparisons, audits, benchmarks."""
