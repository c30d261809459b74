"""The Triton kernels of the CUDA backend, each beside its plain-torch twin."""
