"""The hooks that a backend implements, in the order of a backend's life.

Implementations take any subset of a hook's arguments, by name: positional, no defaults, no keyword-only arguments
(pluggy drops both in ways that differ between its versions). Mark them with ``@moe_core.hookimpl``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from .types import BackendInfo, Dispatched, ExpertsOut, Pending, Plan, Routing, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from .config import MoEConfig
    from .platform import Platform
    from .report import SelectionReport
    from .weights import MoEWeights

PROJECT = "moe_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks the hook implementations of a backend or an observer."""

# Discovery: cheap, may run often, nothing heavy is imported.


@hookspec
def moe_backend_info() -> BackendInfo:  # type: ignore[empty-body]
    """Say who you are.

    Called: once, when plugins are loaded. Must not import a heavy dependency or look at the hardware.
    A plugin without it is an observer.
    """


@hookspec
def moe_probe(platform: Platform) -> Verdict:  # type: ignore[empty-body]
    """Say whether this backend is usable here.

    Called: at every selection. May import the backend's dependency; must answer when it is missing, with the command
    that installs it as remedy. Must not allocate on a device. An exception marks the plugin as broken.
    """


# Negotiation.


@hookspec
def moe_supports(config: MoEConfig, stage: str, platform: Platform) -> Verdict:  # type: ignore[empty-body]
    """Say whether this stage of this config can be done, and with what traits.

    Called: at every selection, for the stages of ``BackendInfo.stages``. Not implemented: yes to each, default traits.
    """


@hookspec(firstresult=True)
def moe_prepare(config: MoEConfig, weights: MoEWeights, platform: Platform) -> object:
    """Bring the weights into this backend's own layout.

    Called: once a bind, and again when a weight has changed. Must not change ``weights``; what it has a copy of it may
    ``weights.release``, which frees the memory where the user has given the weights away. Unless it returns ``weights``
    themselves, the core then runs ``moe_experts`` on two tokens that go to one expert, without router_logits, and
    refuses the bind where the result differs from the dense formula (``config.check_layout``).
    Returns: any object but None; it becomes ``plan.weights`` of this backend's stages. A mapping ``strategies`` on it,
        stage -> text, replaces the trait ``strategy`` in the binding's report; of a method
        ``counters() -> Mapping[str, int]`` (compilations, for example) the runner's report shows what it says.
    """


# The stages: hot. No host synchronisation, no change of the inputs (unless ``mutates_input`` was declared).


@hookspec(firstresult=True)
def moe_gate(plan: Plan, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None) -> Routing:  # type: ignore[empty-body]
    """Choose the experts of every token.

    Args:
        hidden_states: [T, H], ``plan.dtype``; T may be 0.
        router_logits: [T, E], or None where the gate computes them from ``plan.weights``.
        input_ids: [T] token ids, or None; hash routing needs them.
    Returns: Routing, ids distinct within a row, highest selection score first, ties to the lowest id.
    """


@hookspec(firstresult=True)
def moe_shared_experts(plan: Plan, hidden_states: Tensor) -> Pending:  # type: ignore[empty-body]
    """Start the shared experts, sigmoid gate included; [T, H].

    Called: before the other stages, possibly on a second stream, and only where the config has shared experts.
    """


@hookspec(firstresult=True)
def moe_experts(  # type: ignore[empty-body]
    plan: Plan, hidden_states: Tensor, routing: Routing | None, router_logits: Tensor | None
) -> ExpertsOut:
    """Run the routed experts, zero experts included.

    Args:
        hidden_states: [T, ``config.expert_hidden_size``].
        routing: None where the stage declared ``owns_routing``; a probe at bind then compares it with the config.
    Returns: ExpertsOut as wide as ``hidden_states``; columns behind that are a kernel's padding and are cut off.
    """


@hookspec(firstresult=True)
def moe_reduce(plan: Plan, routing: Routing | None, experts_out: ExpertsOut, shared: Pending) -> Tensor:  # type: ignore[empty-body]
    """Weight and sum the experts, add the shared experts; [T, H] in ``plan.dtype``.

    Must call ``shared.result()`` exactly once (it is None in a layer without shared experts).
    """


# Expert parallel only.


@hookspec(firstresult=True)
def moe_dispatch(plan: Plan, hidden_states: Tensor, routing: Routing) -> Dispatched:  # type: ignore[empty-body]
    """Send each token to the ranks that hold its experts.

    Args:
        plan: ``plan.parallel`` is this rank's view of the mesh.
        hidden_states: [T, ``config.expert_hidden_size``] of this rank; T may be 0, and every rank takes part.
        routing: global ids.
    Returns: Dispatched with local ids, -1 for experts of other ranks and zero experts on exactly one rank; or an
        iterable of several, which is advanced when the part before was combined.
    """


@hookspec(firstresult=True)
def moe_combine(plan: Plan, experts_out: ExpertsOut, dispatched: Dispatched) -> Any:
    """Bring the experts' outputs back to the ranks of their tokens.

    Returns: ExpertsOut of this rank's own tokens, reduced; None for every part but the last.
    """


# Tools.


@hookspec(firstresult=True)
def moe_tune(arguments: list[str]) -> int:  # type: ignore[empty-body]
    """Search for the fastest block sizes, or whatever this backend chooses between, on this machine, and keep them.

    Called: by ``moe-core tune``, with what stands behind the backend's name on the command line; ``--help`` is the
    backend's to answer.
    Returns: the exit code of the process.
    """


@hookspec(firstresult=True)
def moe_advise(platform: Platform) -> list[str]:  # type: ignore[empty-body]
    """Say what would make this backend faster on this machine: one text for each thing to set, with how much it gives.

    Called: by ``moe-core doctor``, where the backend is usable. Nothing to say: an empty list.
    """


# Observers.


@hookspec
def moe_bound(report: SelectionReport) -> None:
    """A runner was bound. Results are ignored; an exception is logged and goes no further."""
