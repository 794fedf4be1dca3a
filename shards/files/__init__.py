"""Tensor files that the two stages exchange, and indexes of safetensors files."""
