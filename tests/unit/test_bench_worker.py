"""moe-core bench: worker processes, their protocol, and the command line as a user types it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_core.bench import record as records
from moe_core.bench.cli import main
from moe_core.bench.worker import ProcessWorker, RequestFailed, WorkerDied, serve

FAKE = """
import json, os, signal, sys
for line in sys.stdin:
    request = json.loads(line)
    command = request.pop("command")
    if command == "die":
        print("the end is near", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "fail":
        print(json.dumps({"failed_request": "ValueError: no"}), flush=True)
    else:
        print(json.dumps({"was": command, **request}), flush=True)
"""


def fake() -> ProcessWorker:
    return ProcessWorker("fake", [sys.executable, "-S", "-c", FAKE], {"threads": 2}, os.environ)


def test_requests_and_replies_are_lines() -> None:
    worker = fake()
    assert worker.request("build", candidate="ümlaut\nloop") == {"was": "build", "candidate": "ümlaut\nloop"}
    with pytest.raises(RequestFailed, match="ValueError: no"):
        worker.request("fail")
    assert worker.request("hello") == {"was": "hello"}, "a failed request is not the end"
    worker.close()
    worker.close()


def test_a_death_says_the_signal_and_the_last_words() -> None:
    worker = fake()
    with pytest.raises(WorkerDied, match=r"signal 9 \(SIGKILL\): the end is near"):
        worker.request("die")
    worker.close()


def test_a_python_that_is_not_there() -> None:
    with pytest.raises(WorkerDied, match="No such file"):
        ProcessWorker("other", ["/no/such/python"], {}, os.environ)


def test_a_session_that_raises_answers_and_lives_on() -> None:
    replies = io.StringIO()
    requests = [{"command": "start", "device": "cpu"}, {"command": "load", "shape": 1}, {"command": "clock"}]
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    started, failed, clock = map(json.loads, replies.getvalue().splitlines())
    assert started == {} and failed["failed_request"].startswith("TypeError") and clock["cpu_seconds"] > 0


def test_the_command_line_without_typer_measures_writes_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = "bench --shapes 32x16x4x2 --tokens 2 --quick --peers loop --stages experts --device cpu --threads 1"
    arguments = [*words.split(), "--json", str(out), "--markdown", str(tmp_path / "out.md")]
    code = f"import sys, runpy; sys.modules['typer'] = None; sys.argv = ['moe-core', *{arguments!r}]\n"
    code += "runpy.run_module('moe_core', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "floor/time" in done.stdout and "ceilings float32" in done.stdout
    record = records.load(out)
    assert record["complete"] and record["command"].startswith("moe-core bench --shapes 32x16x4x2")
    assert {result["name"] for result in record["cells"][0]["results"]} == {"moe_core", "loop"}
    assert "| shape |" in (tmp_path / "out.md").read_text()


def test_errors_name_what_was_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, message in (
        ("--shapes huge", "shape 'huge': expected one of"),
        ("--tokens 1,x", "--tokens 1,x: expected whole numbers"),
        ("--peers nobody", "peer 'nobody': expected one of"),
        ("--worker zen", "--worker zen: expected NAME=PYTHON"),
        ("--device warp", "--device 'warp'"),
        (f"--show {tmp_path}/none.json", "No such file"),
    ):
        assert main(words.split()) == 1
        assert message in capsys.readouterr().err


def test_compare_prints_what_moved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from .test_bench_record import make, result

    for name, median in (("a", 4.0), ("b", 8.0)):
        records.save(make(result("moe_core", "moe_core", median)), tmp_path / f"{name}.json")
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "slower" in out and "2.00" in out and "1 of 1 times moved" in out
