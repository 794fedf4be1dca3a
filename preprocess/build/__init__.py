"""The build: makes the shards of the plan's units, on one machine or many."""
