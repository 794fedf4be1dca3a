"""Batches: the order of samples, the loader, the draws of noise and timesteps."""
