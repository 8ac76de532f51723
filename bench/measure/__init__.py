"""How a figure is taken and kept: timing, CUDA graphs, floors, the tensors, the CSV written and read."""
