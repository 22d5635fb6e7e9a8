"""What the layers' and optimizers' work is done with, beside NumPy: compiled loops, oneDNN, and BLAS as it is.

Nothing here is needed: where an optional library is missing, or `kernels: numpy` was asked for, NumPy does all.
"""
