"""The contract between the two stages: sealed shards, their identity, and the reader that cannot be fooled."""

__version__ = "0.1.0"
