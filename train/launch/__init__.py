"""Processes of a run on one machine or many: start them, watch them, name the one that failed first."""
