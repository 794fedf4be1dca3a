"""The format on disk: names, keys, tars, arrays, commits, ledgers, identity."""
