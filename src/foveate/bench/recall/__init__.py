"""Recall of small models against the size of their state: `foveate recall`."""
