"""Reading machine code with no GPU: every Triton kernel compiled for every architecture, and the CUDA library."""
