"""``python -m moe_core`` is ``moe-core``."""

import sys

if sys.argv[1:2] == ["bench"]:
    # Machines that only measure may lack typer, which bench does without.
    from .bench.cli import main as bench

    raise SystemExit(bench(sys.argv[2:]))

from .cli import main

main()
