"""Sampling from the model: the solver and the sampling loop."""
