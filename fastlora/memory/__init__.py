"""What a training step holds in memory, from shapes alone: one file a term. Needs neither torch nor a device."""
