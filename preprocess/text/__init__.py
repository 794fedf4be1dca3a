"""Captions: composed for a window from the caption levels of its record, and cleaned."""
