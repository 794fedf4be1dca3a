"""Ranks, FSDP2 and Ulysses."""
