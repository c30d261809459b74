"""The TPU backend of moe_core."""
