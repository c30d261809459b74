"""docs/writing-a-backend.md, followed to the letter: its files are built, installed, listed, and pass the kit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "writing-a-backend.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
MODULE, TEST = PYTHON[0], next(block for block in PYTHON if block.startswith("# test_hello.py"))
PYPROJECT = re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


def run(site: Path, *arguments: str) -> str:
    """A command with the installed plugin on its path, away from every source."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore::UserWarning", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(folder: Path, module: str) -> Path:
    """The page's two files, built and installed into a folder of their own."""
    assert PYPROJECT is not None
    source, site = folder / "source", folder / "site"
    source.mkdir()
    (source / "moe_hello.py").write_text(module, encoding="utf-8")
    (source / "pyproject.toml").write_text(PYPROJECT.group(1), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=280)
    return site


def kit(site: Path) -> str:
    command = next(line for line in PAGE.splitlines() if line.startswith("pytest -p moe_core"))
    return run(site, "-m", *command.split(), "-q", "-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def first_screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("first"), MODULE)


def test_the_first_screen_is_listed_explained_and_examined(first_screen: Path) -> None:
    listed = {status["name"]: status for status in json.loads(run(first_screen, "-m", "moe_core", "list", "--json"))}
    assert listed["hello"]["status"] == "ok" and listed["hello"]["origin"] == "moe-core-hello"
    for line in re.findall(r"^moe-core (.+)$", PAGE, flags=re.MULTILINE):
        assert "hello" in run(first_screen, "-m", "moe_core", *line.split())


def test_the_first_screen_passes_the_kit(first_screen: Path) -> None:
    assert re.search(r"moe_core conformance of hello.* 0 failed", kit(first_screen))


def test_its_authors_test_file_is_collected(first_screen: Path) -> None:
    (first_screen / "test_hello.py").write_text(TEST, encoding="utf-8")
    out = run(first_screen, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "test_hello.py")
    assert "TestHello" in out


def test_what_the_page_adds_later_passes_the_kit_too(tmp_path: Path) -> None:
    """The probe that looks for a package and the weights that are converted once, as the text says to put them in."""
    probe = next(block for block in PYTHON if "platform.version" in block)
    prepare = next(block for block in PYTHON if "def moe_prepare" in block)
    plain_probe = re.search(r"@hookimpl\ndef moe_probe\(platform\):\n    return Verdict.yes\(\)\n", MODULE)
    assert plain_probe is not None
    module = MODULE.replace(plain_probe.group(), probe).replace("Verdict.yes(supports_backward=True)", "Verdict.yes()")
    module = module.replace("import torch\n", "import dataclasses\n\nimport torch\n", 1)
    module += "\n\n" + prepare.replace("import dataclasses\n\n\n", "")
    assert re.search(r"moe_core conformance of hello.* 0 failed", kit(installed(tmp_path, module)))
