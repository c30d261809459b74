"""Pallas kernels of the TPU backend."""
