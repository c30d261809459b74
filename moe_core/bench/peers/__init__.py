"""Adapters: one module a peer, each imports its library only when it is built. No peer's code is copied."""
