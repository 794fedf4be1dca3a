"""The reader: open a dataset, its samples, its index."""
