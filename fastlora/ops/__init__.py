"""The operators: what each computes, its autograd, and one file a backend; the file name is operation_backend."""
