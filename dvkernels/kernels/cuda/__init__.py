"""The kernels of CUDA devices: compiled by Numba, launched through the driver."""
