"""The loop: from a recipe and data to a checkpoint that a run can go on from."""
