"""The GPU device computes with the kernels of kernels.cu, cublasLt and cuDNN, on arrays that stay on the GPU."""
