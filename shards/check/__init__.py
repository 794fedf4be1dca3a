"""Verification: every byte, every array, and files that belong to nothing."""
