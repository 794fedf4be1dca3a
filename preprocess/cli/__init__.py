"""Stage 1 on the command line: `wanprep`."""
