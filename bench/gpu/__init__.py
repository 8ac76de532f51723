"""Everything to be done on a CUDA machine, in phases with time limits."""
