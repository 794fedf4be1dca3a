"""Statistics of a dataset, and what looks wrong in it."""
