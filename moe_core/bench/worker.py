"""Processes that measure: JSON lines over pipes, one request and one reply at a time.

Run as a script, also by another Python whose environment holds torch and pluggy but no moe_core: it then loads the
package that it lies in, and nothing else from beside it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

SCRIPT = Path(__file__).resolve()


class WorkerDied(Exception):
    """The process ended without a reply; the text says how, with the end of what it wrote to standard error."""


class RequestFailed(Exception):
    """The process replied that it could not do what was asked."""


class Worker(Protocol):
    """Whatever answers requests."""

    name: str

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait.

        Raises:
            RequestFailed: the session raised. WorkerDied: there is no session any more.
        """
        ...

    def close(self) -> None:
        """Let the process end."""
        ...


class ProcessWorker:
    """A child process.

    Args:
        name: in records; ``main`` is this interpreter.
        command: the process; it speaks the protocol on standard input and output.
        settings: the arguments of its Session.
        env: its environment.
    """

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.name = name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=dict(env),
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            raise WorkerDied(f"{command[0]}: {error.strerror}") from error
        try:
            self.request("start", **settings)
        except (WorkerDied, RequestFailed):
            self.close()
            raise

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "failed_request" in reply:
            raise RequestFailed(reply["failed_request"])
        return reply

    def close(self) -> None:
        """End of input ends it; if not, we do."""
        if self._errors.closed:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        how = f"exit status {code}"
        if code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1][:200]}" if lines else how


class LocalWorker:
    """The same in this process; for tests, and where a process more is not wanted."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        from .session import Session

        self.name = name
        self._session = Session(**settings)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask; values pass through JSON as they would between processes."""
        request = json.loads(json.dumps({"command": command, **arguments}))
        return json.loads(json.dumps(self._session.handle(request)))  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop what is large."""
        self._session.handle({"command": "free"})


def spawn(name: str, python: str, settings: Mapping[str, Any]) -> ProcessWorker:
    """A worker on the interpreter ``python``; with the threads of ``settings``, which a process must be born with.

    Raises:
        WorkerDied: it does not start.
        RequestFailed: it starts and cannot import what it needs.
    """
    env = dict(os.environ)
    if settings.get("threads"):
        # A peer may bring an OpenMP runtime of its own, which torch.set_num_threads does not reach.
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(settings["threads"])
    if python == sys.executable:
        env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    else:
        env.pop("PYTHONPATH", None)
    return ProcessWorker(name, [python, "-P", str(SCRIPT)], settings, env)


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer line by line until the input ends."""
    session: Any = None
    for line in requests:
        request = json.loads(line)
        try:
            if request.get("command") == "start":
                del request["command"]
                from moe_core.bench.session import Session

                session = Session(**request)
                reply: dict[str, Any] = {}
            else:
                reply = session.handle(request)
        except Exception as error:  # the reply is where it belongs: the other side decides
            first = (str(error).strip().splitlines() or [""])[0]
            reply = {"failed_request": f"{type(error).__name__}: {first}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _load_package() -> None:
    """Make ``moe_core`` importable from where this file lies, without a look at its neighbours."""
    import importlib.util

    folder = SCRIPT.parents[1]
    spec = importlib.util.spec_from_file_location(
        "moe_core", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_core"] = module
    spec.loader.exec_module(module)


def main() -> None:
    """Entry of the child process."""
    # Whatever a peer prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        _load_package()
        import moe_core.bench.session  # noqa: F401 (what it needs is missing here or nowhere)
    except ImportError as error:
        sys.stdin.readline()
        replies.write(json.dumps({"failed_request": f"{type(error).__name__}: {error}"}) + "\n")
        return
    gc.freeze()  # what was imported stays; collections look at the rest alone
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
