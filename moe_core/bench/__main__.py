"""``python -m moe_core.bench`` is ``moe-core bench``; it works where typer is not installed."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
