"""The build: units of the plan in, sealed shards out, on one machine or many."""
