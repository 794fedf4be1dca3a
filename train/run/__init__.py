"""One training run: its folder, its state, its log, and the weights it trains."""
