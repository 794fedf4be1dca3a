"""Verification: checks every byte and every array, and finds files that no commit names."""
