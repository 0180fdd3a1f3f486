"""Claims of attention and caches made for decoding."""
