"""Stage 2 on the command line: `wantrain`."""
