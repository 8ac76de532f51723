"""Everything a CUDA machine is asked for, in bounded phases."""
