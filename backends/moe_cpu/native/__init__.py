"""The CPU backend's own kernel: one C++ file, compiled on the machine that runs it."""
