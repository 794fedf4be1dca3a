"""Parallel training: ranks (processes), FSDP2 (weights shared out) and Ulysses (tokens shared out)."""
