"""Memory, FLOPs, traffic and days of a run, before it runs."""
