"""The writer of sealed shards."""
