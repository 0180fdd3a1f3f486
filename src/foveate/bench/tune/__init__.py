"""Searching the settings of a mechanism for one model."""
