"""`foveate inspect`: the core analyses of one model on one text, as plain data for a page."""
