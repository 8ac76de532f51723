"""Training runs: recipe, data, loop, and checkpoints from which a run can continue."""
