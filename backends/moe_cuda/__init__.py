"""The CUDA backend of moe_core."""
