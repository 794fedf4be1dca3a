"""The writer of shards: samples into a tar, then its ledger and its commit."""
