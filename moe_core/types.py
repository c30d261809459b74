"""The values that cross the hook boundary: small, immutable and free of behaviour worth overriding.

Shape letters used in the whole library: T tokens, H hidden size, I intermediate size, E experts, K top_k, N = T*K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from .errors import StageError

if TYPE_CHECKING:
    from .config import MoEConfig

HOOK_API: Final = 1
"""Major version of the hook contract. New arguments are free; anything else raises it."""

STAGES: Final = ("gate", "shared_experts", "experts", "reduce")
"""The stages of one forward pass, in the order in which the core launches them after the fork."""

PARALLEL_STAGES: Final = ("dispatch", "combine")
"""Stages that exist only where experts live on several devices."""

TRAIT_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "mutates_input": False,
        "owns_routing": False,
        "supports_backward": False,
        "deterministic": True,
        "entry": "python",
        "workspace_bytes": 0,
        "strategy": "",
    }
)
"""What a stage promises when its verdict does not say otherwise (DESIGN.md section 3)."""


@dataclass(frozen=True)
class Verdict:
    """An answer with its reason: build it with :meth:`yes` or :meth:`no`, never by hand."""

    ok: bool
    reason: str = ""
    remedy: str = ""
    traits: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.ok, bool) or not isinstance(self.traits, Mapping):
            raise TypeError(f"Verdict(ok={self.ok!r}, traits={self.traits!r}): build it with Verdict.yes or Verdict.no")
        for name, text in (("reason", self.reason), ("remedy", self.remedy)):
            if not self.ok and (not isinstance(text, str) or not text.strip()):
                raise TypeError(f"Verdict.no needs a non-empty {name}, got {text!r}")
        unknown = sorted(set(self.traits) - set(TRAIT_DEFAULTS))
        if unknown:
            raise TypeError(f"unknown trait(s) {', '.join(unknown)}; the known ones are {', '.join(TRAIT_DEFAULTS)}")
        for name, value in self.traits.items():
            expected = type(TRAIT_DEFAULTS[name])
            if type(value) is not expected:
                raise TypeError(f"trait {name}={value!r}: expected {expected.__name__}")
        if self.trait("entry") not in ("python", "op"):
            raise TypeError(f"trait entry={self.trait('entry')!r}: expected 'python' or 'op'")
        if self.trait("workspace_bytes") < 0:
            raise TypeError(f"trait workspace_bytes={self.trait('workspace_bytes')!r}: expected at least 0")

    @classmethod
    def yes(cls, **traits: Any) -> Verdict:
        """Usable. ``traits`` are those of :data:`TRAIT_DEFAULTS`; omitted ones keep their default.

        Raises:
            TypeError: an unknown trait, a value of another type than its default, or an ``entry`` other than "python"
                or "op".
        """
        return cls(True, traits=MappingProxyType(dict(traits)))

    @classmethod
    def no(cls, reason: str, remedy: str) -> Verdict:
        """Not usable. ``reason`` says why, ``remedy`` what a user can do (a command, a setting, another backend)."""
        return cls(False, reason=reason, remedy=remedy)

    def trait(self, name: str) -> Any:
        """The value of one trait, defaults included."""
        return self.traits.get(name, TRAIT_DEFAULTS[name])

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """What a backend says of itself without importing anything heavy.

    Args:
        name: equals the entry point's name.
        hook_api: the :data:`HOOK_API` major that the plugin was written for.
        device_types: ``torch.device.type`` values that automatic selection may choose it for.
        priority: highest usable wins; the reference has 0. A tie is an error.
        stages: the stages it implements; the others come from the reference.
        extra: the extra of moe-core (or the distribution) that installs its dependencies.
        url: where its users report problems.
    """

    name: str
    hook_api: int = HOOK_API
    device_types: tuple[str, ...] = ("cpu",)
    priority: int = 10
    stages: tuple[str, ...] = ("experts",)
    extra: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise TypeError(f"BackendInfo.name={self.name!r}: expected a short identifier such as 'toy'")
        for label in ("hook_api", "priority"):
            value = getattr(self, label)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"BackendInfo.{label}={value!r}: expected an int")
        for label in ("device_types", "stages"):
            value = getattr(self, label)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"BackendInfo.{label}={value!r}: expected a tuple of strings")
            object.__setattr__(self, label, tuple(value))
        unknown = sorted(set(self.stages) - {*STAGES, *PARALLEL_STAGES})
        if unknown:
            raise TypeError(
                f"BackendInfo.stages: unknown {', '.join(unknown)}; known: {', '.join((*STAGES, *PARALLEL_STAGES))}"
            )


class Routing(NamedTuple):
    """Which experts serve each token, and with what weight.

    ``topk_weights`` [T, K] float32 already contain ``routed_scaling_factor`` unless
    ``config.apply_routed_scale_to_output``; ``topk_ids`` [T, K] int32, -1 contributes nothing.
    """

    topk_weights: Tensor
    topk_ids: Tensor


class ExpertsOut(NamedTuple):
    """``value`` is [T, K, H] unweighted when ``reduced`` is False, [T, H] weighted and summed when it is True."""

    value: Tensor
    reduced: bool


class Dispatched(NamedTuple):
    """Tokens that arrived at this rank's experts; ``handle`` is what ``moe_combine`` needs to send them back."""

    hidden_states: Tensor
    routing: Routing
    handle: Any


class Pending:
    """The shared experts' result, possibly still being computed on another stream.

    ``result()`` waits for it and hands it over; it may be called exactly once, so that nobody adds the shared experts
    twice. Layers without shared experts pass a ``Pending`` whose result is None, so a reduce never needs a special
    case to take it.

    Args:
        value: the finished [T, H] tensor, None, or a callable that waits for it and returns it.
    """

    __slots__ = ("_value", "consumed")

    def __init__(self, value: Tensor | Callable[[], Tensor | None] | None) -> None:
        self._value = value
        self.consumed = False

    @property
    def ready(self) -> Tensor | None:
        """The tensor, where it is there already; waits for nothing and consumes nothing."""
        return self._value if isinstance(self._value, Tensor) else None

    def result(self) -> Tensor | None:
        """Wait, and return the [T, H] tensor (None where the layer has no shared experts).

        Raises:
            StageError: called a second time.
        """
        if self.consumed:
            raise StageError(
                "Pending.result() was called twice: the shared experts would be added twice; "
                "moe_reduce calls it exactly once"
            )
        self.consumed = True
        value, self._value = self._value, None
        if value is None or isinstance(value, Tensor):
            return value
        return value()


class Workspace:
    """Scratch memory of one call on one stream.

    Backed by torch's caching allocator, which already keeps blocks apart by stream and gives a captured graph a pool
    of its own; a second arena on top of it would have to prove the same again.
    """

    __slots__ = ("device",)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that lives until the caller drops it."""
        return torch.empty(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stage gets besides its inputs.

    ``weights`` is what the serving backend's ``moe_prepare`` returned, or plain :class:`MoEWeights` where it has none;
    ``dtype`` is that of ``hidden_states`` and of the layer's output. The other fields are for observers: ``backend``
    and ``function`` name who serves this stage, ``layer`` is a number that all stages of one runner share.
    ``parallel`` is the :class:`moe_core.parallel.Ranks` of a dispatch or combine stage, None elsewhere.
    ``leave_sum`` asks an experts stage for [T, K, H], because its backend's reduce stage is about to sum the rows part
    by part; a stage that has no such result sums nevertheless. No other stage sees it set.
    """

    config: MoEConfig
    weights: Any
    device: torch.device
    dtype: torch.dtype
    backend: str = ""
    function: str = ""
    layer: int = -1
    parallel: Any = None
    leave_sum: bool = False

    def workspace(self) -> Workspace:
        """Lease scratch memory for the current call and stream."""
        return Workspace(self.device)
