"""A run's own things: its folder, its state, its log, what it trains."""
