"""The demo's corpus, and a local server for it."""
