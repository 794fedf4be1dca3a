"""The frozen plan: scan the annotations, filter on metadata, order, cut into units; retries."""
