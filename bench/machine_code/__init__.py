"""Reading machine code without a GPU: every Triton kernel compiled for every architecture, and the CUDA library."""
