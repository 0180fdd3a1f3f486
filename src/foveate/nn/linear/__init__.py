"""Linear attention, recurrences, state spaces, and what is mixed with them."""
