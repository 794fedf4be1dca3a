"""The HTML page about a dataset: `wanshards report`."""
