"""The HTML page about a run: `wantrain report`."""
