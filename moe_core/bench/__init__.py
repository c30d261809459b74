"""``moe-core bench``: times of moe_core, of other implementations, and of what the machine could do at best.

The only package of moe_core that names model shapes and other libraries: it measures them. Nothing else imports it.
"""
