"""The plan: scan the annotations, filter on metadata, order, cut into units, write once; plan retries."""
