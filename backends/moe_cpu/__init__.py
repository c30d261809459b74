"""The CPU backend of moe_core."""
