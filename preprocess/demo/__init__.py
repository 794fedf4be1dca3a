"""The corpus of the demonstration, and a server for it."""
