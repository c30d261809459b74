"""What the jax functions must know of a layer, as a value that travels through an operator's schema as text."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass

from moe_core import MoEConfig
from moe_core.activations import ACTIVATIONS

FORMS = ("ragged", "gmm", "dense")
"""``ragged``: XLA's own grouped product. ``gmm``: Pallas kernels with a tile table. ``dense``: every expert on every
row, the form that needs nothing but torch."""


@dataclass(frozen=True)
class Spec:
    """The part of MoEConfig that the routed experts compute with.

    Args:
        held: experts whose weights are here; ids from here to ``first_zero`` belong to somebody else.
        first_zero, ids: ids ``first_zero`` to ``ids - 1`` are zero experts.
        scale: multiplies the routed sum.
        form: of the grouped products, one of :data:`FORMS`.
        interpret: run the Pallas kernels in the interpreter, where there is no TPU.
    """

    held: int
    first_zero: int
    ids: int
    gated: bool = True
    activation: str = "silu"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    weight_on_input: bool = False
    scale: float = 1.0
    norm_eps: float | None = None
    norm_scale_first: bool = False
    form: str = "ragged"
    interpret: bool = False

    def expected(self, slots: int) -> int:
        """Of ``slots`` choices, those that fall on experts here if all are chosen alike."""
        return -(-slots * self.held // max(self.first_zero, 1))

    def dumps(self) -> str:
        """As JSON; equal specs give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@functools.cache
def loads(text: str) -> Spec:
    """The inverse of :meth:`Spec.dumps`."""
    return Spec(**json.loads(text))


def is_named(config: MoEConfig) -> bool:
    """Whether the activation is one of moe_core's; a callable works on torch tensors, which jax functions never see."""
    return isinstance(config.activation, str) and config.custom_activation_function is None


def spec_of(config: MoEConfig) -> Spec:
    """The spec of a layer; what is not a name in ``config.activation`` is left to the form in torch."""
    return Spec(
        held=config.num_held_experts,
        first_zero=config.num_experts,
        ids=config.num_router_outputs,
        gated=config.gated,
        activation=config.activation if config.activation in ACTIVATIONS else "",
        interleaved=config.w13_interleaved,
        limit=config.swiglu_limit,
        alpha=config.swiglu_alpha,
        beta=config.swiglu_beta,
        weight_on_input=config.apply_router_weight_on_input,
        scale=config.output_scale,
        norm_eps=config.post_expert_norm_eps,
        norm_scale_first=config.post_expert_norm_scale_first,
    )
