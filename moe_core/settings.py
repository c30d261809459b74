"""How a user asks for a backend: ``use_backend``, ``configure`` and the environment.

The environment is read when something is bound, never when the package is imported. docs/env.md lists the variables.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import SettingError

_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("moe_core_backend", default=None)
_configured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Which backends were asked for, by whom, and whether a substitute is allowed."""

    names: tuple[str, ...] = ()
    source: str = "auto"

    @property
    def explicit(self) -> bool:
        """True when another backend is never an acceptable answer."""
        return self.source in ("argument", "use_backend")

    def __str__(self) -> str:
        return "auto" if not self.names else f"{self.source}: {', '.join(self.names)}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every bind inside the ``with`` uses this backend or fails. Follows contextvars: threads and tasks keep apart.

    Raises:
        UnknownBackendError: at the first bind, when nobody registered ``name``.
    """
    token = _context.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _context.reset(token)


def configure(*, backends: Sequence[str] | None = None) -> None:
    """Set the process-wide order of preference.

    Args:
        backends: names tried in order; when none can be used that is an error, not automatic choice. None or an empty
            sequence returns to automatic choice.
    """
    global _configured
    if isinstance(backends, str):
        raise SettingError(f"configure(backends={backends!r}): expected a sequence of names; pass [{backends!r}]")
    _configured = tuple(_check_name(name, "configure") for name in backends or ())


def requested(argument: str | None) -> Request:
    """The request in force: argument, ``use_backend``, ``configure``, ``MOE_CORE_BACKEND``, automatic."""
    if argument is not None:
        return Request((_check_name(argument, "backend"),), "argument")
    context = _context.get()
    if context is not None:
        return Request((context,), "use_backend")
    if _configured:
        return Request(_configured, "configure")
    names = env_list("MOE_CORE_BACKEND")
    return Request(names, "MOE_CORE_BACKEND") if names else Request()


def env_list(variable: str) -> tuple[str, ...]:
    """A comma-separated environment variable; empty items are dropped."""
    return tuple(item.strip() for item in os.environ.get(variable, "").split(",") if item.strip())


def env_flag(variable: str) -> bool:
    """A boolean environment variable: 0, 1, true or false; unset is false.

    Raises:
        SettingError: any other value.
    """
    text = os.environ.get(variable, "0").strip().lower()
    if text in ("1", "true"):
        return True
    if text in ("0", "false", ""):
        return False
    raise SettingError(f"{variable}={text!r}: expected 0, 1, true or false")


def seconds(env: Mapping[str, str], variable: str, default: float) -> float:
    """An environment variable that holds a time in seconds; 0 sets no limit.

    Raises:
        SettingError: anything but a finite number of at least 0.
    """
    text = env.get(variable, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise SettingError(f"{variable}={text!r}: expected a number of seconds, such as {default:g}, or 0 for no limit")
    return value


def _check_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise SettingError(f"{where}: {name!r} is no backend name; expected a string such as 'reference'")
    return name.strip()
