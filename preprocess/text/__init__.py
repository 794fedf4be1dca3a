"""Captions: composed from the levels of a record for a window, and cleaned."""
