"""What a block keeps for its backward pass, and the hand-written backward that keeps no more."""
