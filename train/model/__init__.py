"""The DiT of Wan2.2-TI2V-5B: blocks, attention, positions, weights."""
