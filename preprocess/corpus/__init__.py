"""Annotations on disk or in archives, and the records read from them."""
