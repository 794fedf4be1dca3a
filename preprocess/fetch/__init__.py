"""Clips from HTTP, S3 and disk: retry, limits, allow-list, signatures, cache."""
