"""What a block keeps for its backward pass, and a hand-written backward pass that needs only that."""
