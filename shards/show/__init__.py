"""What a dataset holds, on a terminal: overview, one sample, plain files."""
