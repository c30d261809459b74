"""moe_core inside other libraries; each is imported by name, none by moe_core itself."""
