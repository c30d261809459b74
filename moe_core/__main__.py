"""``python -m moe_core`` is ``moe-core``."""

from .cli import main

main()
