"""Processes on one machine or many: start, watch, name the first failure."""
