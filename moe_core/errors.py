"""Every error that moe_core raises on purpose.

Each message names the offending value, what was expected and the remedy. All derive from :class:`MoECoreError`, so one
``except`` catches the library; the built-in base (``ValueError``, ``RuntimeError``...) is there for callers that know
nothing of moe_core.
"""

from __future__ import annotations


def describe(error: BaseException) -> str:
    """Type and first line of an error that somebody else's code raised; its own ``__str__`` may be broken too."""
    try:
        lines = str(error).strip().splitlines()
    except KeyboardInterrupt:
        raise
    except BaseException as second:
        lines = [f"(its text cannot be had: {type(second).__name__})"]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def show(value: object) -> str:
    """The repr of somebody else's value, at most 200 characters; the type where it has no repr."""
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = f"<{type(value).__name__} without a repr>"
    return text if len(text) <= 200 else text[:197] + "..."


class MoECoreError(Exception):
    """Base of all errors of moe_core."""


class ConfigError(MoECoreError, ValueError):
    """A :class:`~moe_core.MoEConfig` field, or a combination of fields, that cannot work."""


class WeightsError(MoECoreError, ValueError):
    """A weight tensor is missing, unexpected, or has the wrong shape, dtype or device."""


class CheckpointError(MoECoreError, ValueError):
    """A checkpoint that cannot be read as asked: a tensor is missing, unknown, quantised or of another shape."""


class InputError(MoECoreError, ValueError):
    """An argument of a call has the wrong shape, dtype or device, or is missing."""


class RoutingError(MoECoreError, ValueError):
    """Expert ids out of range, or routing weights or logits that the config's policy refuses."""


class SelectionError(MoECoreError, RuntimeError):
    """No backend could be chosen; ``report`` is the :class:`~moe_core.SelectionReport` that says why."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class UnknownBackendError(SelectionError):
    """A backend was asked for by a name that nobody registered."""


class BackendUnavailableError(SelectionError):
    """An explicitly requested backend cannot run here or refuses this config. It is never substituted."""


class AmbiguousBackendError(SelectionError):
    """Two usable backends tie for the highest priority; installation order never decides."""


class GradientError(SelectionError):
    """Gradients may be needed, and the explicitly requested backend has no backward."""


class BindError(MoECoreError, RuntimeError):
    """A backend accepted a config but failed to prepare its weights (the cause is chained)."""


class StageError(MoECoreError, RuntimeError):
    """A stage failed or broke its contract during a call; names backend and stage."""


class ParallelError(MoECoreError, RuntimeError):
    """Ranks of one layer that do not fit together, or a rank that is gone; names axis, rank and what was waited for."""


class PluginError(MoECoreError, RuntimeError):
    """A plugin that was registered by hand breaks the hook contract."""


class ConversionError(MoECoreError, TypeError):
    """A module of another library that moe_core does not recognise, or cannot take over."""


class SettingError(MoECoreError, ValueError):
    """An environment variable or an argument of ``configure`` has a value that cannot be read."""


class BenchError(MoECoreError, ValueError):
    """Settings or a record of ``moe-core bench`` that cannot be used."""
