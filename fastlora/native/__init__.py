"""The compiled libraries: built from `csrc/`, called through ctypes, with every operand checked on the way."""
