# Sourced from the root, with PYTHON and PYTHONPATH set.
# Entry points without an installation, so that backends are found by their names.
SITE=$(mktemp -d)
mkdir -p "$SITE/moe_core-0.dist-info"
"$PYTHON" - "$SITE/moe_core-0.dist-info" <<'END'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
lines = ["[moe_core.backends]", *(f"{name} = {module}" for name, module in project["entry-points"]["moe_core.backends"].items())]
folder = pathlib.Path(sys.argv[1])
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-core\nVersion: 0\n")
END
export PYTHONPATH="$PYTHONPATH:$SITE"
