"""Estimates before a run: memory, FLOPs, bytes between GPUs, days."""
