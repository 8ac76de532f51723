"""`python -m fastlora.native` compiles the C++ library, and the CUDA library where nvcc is found."""

from fastlora.native import cpu, cuda

if __name__ == "__main__":
    cpu.build()
    print(cpu.status()[1])
    print(cuda.build_where_possible())
