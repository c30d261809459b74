"""The check at bind: one expert of what a backend made of the weights, against the dense formula on the plain ones.

A gate taken for an up projection, or a matrix read in the wrong orientation, gives plausible numbers and bad text. Two
tokens through one expert tell, and where they differ the likely mistakes are tried until one explains it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .contract import CALLERS_OWN
from .errors import BindError, WeightsError, describe
from .quant import dequantise, quantised_parts
from .quant.error import activation_error, flip_allowance
from .reference import dense_expert
from .types import ExpertsOut, Plan, Routing
from .weights import MoEWeights, layer_dtype

Dense = Callable[[Tensor], Tensor]
"""[2, H] to [2, H] through one expert."""

Experts = Callable[[Plan, Tensor, Routing, None], object]
"""The experts stage: plan, hidden_states, routing, router_logits."""

_TOKENS = 2
_LARGE = 1e6


@dataclass(frozen=True)
class Mismatch:
    """How far an expert is off, and what explains it."""

    error: float
    allowed: float
    cause: str

    def __str__(self) -> str:
        return f"relative error {self.error:.2g}, allowed {self.allowed:.0e}: {self.cause}"


def check_layout(config: MoEConfig, weights: MoEWeights, dense: Dense, *, expert: int = 0) -> None:
    """Compare one expert of ``weights`` with a function that is known to compute it, such as an original module's.

    Args:
        config: of the layer. weights: in the canonical layout.
        dense: [2, H] to [2, H] in the weights' dtype, through that expert alone, unweighted.
        expert: index into the weights.
    Raises:
        WeightsError: they differ by more than the tolerance table allows; names the expert, the error and the likely
            cause.
    """
    found = _compare(config, weights, expert, dense)
    if found is not None:
        raise WeightsError(
            f"expert {expert} of these weights is not what the given function computes on two probe tokens: {found}"
        )


def last_expert(config: MoEConfig, weights: MoEWeights) -> MoEWeights:
    """A copy of what :func:`check_prepared` compares with, for weights that are gone by then."""
    last = _only(config, weights, max(config.num_held_experts - 1, 0))
    return MoEWeights(**{name: tensor.detach().clone() for name, tensor in last.named_tensors()})


def check_prepared(
    backend: str, origin: str, experts: Experts, plan: Plan, weights: MoEWeights, kept: MoEWeights | None = None
) -> None:
    """Compare one expert of a backend's prepared weights with the plain ones.

    Args:
        experts: the backend's experts stage, without observers. plan: that stage's. weights: what it was prepared from.
        kept: :func:`last_expert`, where those weights are gone.
    Raises:
        BindError: they differ, or the stage fails; names backend, expert, error, what is allowed and the likely cause.
    """
    config = plan.config
    expert = config.num_held_experts - 1  # the last: it is in another place if the order is, or if one got lost
    remedy = f"report it to the author of {origin or backend}, choose another backend, or set config.check_layout=False"
    if not _can_run(config, weights, plan.device):
        return

    def run(x: Tensor) -> Tensor:
        try:
            return _through_stage(experts, plan, expert, x)
        except (_BrokenContract, *CALLERS_OWN):
            raise
        except BaseException as error:  # a third party's code; chained, with the backend's name
            raise BindError(
                f"backend {backend} failed on two probe tokens for expert {expert}: {describe(error)}; {remedy}"
            ) from error

    try:
        found = _compare(config, weights, expert, run, kept)
    except _BrokenContract:
        return
    if found is not None:
        raise BindError(
            f"backend {backend} does not compute expert {expert} with the weights that it prepared: {found}; {remedy}"
        )


class _BrokenContract(Exception):
    """The stage broke its contract in a way that every call reports better."""


def _can_run(config: MoEConfig, weights: MoEWeights, device: torch.device) -> bool:
    """Whether there are numbers to compare, and reading them back is possible now."""
    if not config.check_layout or not config.num_held_experts or device.type == "meta":
        return False
    if config.apply_routed_scale_to_output and config.routed_scaling_factor == 0:  # whoever sums gives zeros
        return False
    if type(weights.w13_weight) not in (Tensor, nn.Parameter):  # a subclass may be a shard, or hold no numbers
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _through_stage(experts: Experts, plan: Plan, expert: int, x: Tensor) -> Tensor:
    """[2, H] through one expert of a stage, unweighted and unscaled."""
    config = plan.config
    ids = torch.full((_TOKENS, config.top_k), -1, dtype=torch.int32, device="cpu")
    ids[:, 0] = expert
    weights = (ids >= 0).to(torch.float32)
    out = experts(plan, x.clone(), Routing(weights.to(plan.device), ids.to(plan.device)), None)
    if not isinstance(out, ExpertsOut) or out.value.ndim != (2 if out.reduced else 3):
        raise _BrokenContract
    if not out.reduced:
        return out.value[:, 0]
    return out.value / config.output_scale


def _compare(
    config: MoEConfig, weights: MoEWeights, expert: int, run: Dense, kept: MoEWeights | None = None
) -> Mismatch | None:
    """None where they agree, or where nothing can be told (weights that are not finite). ``kept`` is that expert alone,
    where the other weights are gone."""
    # Not at the top: the table lives with the conformance kit, which imports this package.
    from .testing.tolerances import tolerance

    device, dtype = weights.device, layer_dtype(config, weights)
    one = kept or _only(config, weights, expert)
    known = torch.bfloat16 if dtype is torch.float32 and _rounds_products() else dtype
    allowed = tolerance(known, "experts") + flip_allowance(config, known, _TOKENS * config.intermediate_size)
    alone = dataclasses.replace(config, num_local_experts=1)
    with torch.no_grad(), _without_autocast(device):
        plain_config, plain = dequantise(alone, one, torch.float32)
        x = _probe(plain, dtype)
        expected = dense_expert(alone, one, 0, x.float())
        if not bool(expected.isfinite().all()) or float(expected.abs().max()) > torch.finfo(dtype).max:
            return None
        got = run(x).float()
        error = _error(got, expected)
        if error <= allowed:
            return None
        if config.quant is None and kept is None:
            return Mismatch(error, allowed, _cause(config, weights, expert, x, got, run, allowed))
        # What a mistake would give is computed from plain numbers, without the rounding of activations.
        near = allowed
        if config.quant is not None:
            near += 2 * activation_error(config, "w13_weight") + activation_error(config, "w2_weight")
        return Mismatch(error, allowed, _cause(plain_config, plain, 0, x, got, run, near))


def _probe(one: MoEWeights, dtype: torch.dtype) -> Tensor:
    """[2, H], the same ones every time, of a size at which the activation is neither linear nor saturated."""
    assert one.w13_weight is not None
    w13 = one.w13_weight[0]
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(_TOKENS, w13.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(w13.device)
    some = w13[:: max(1, w13.shape[0] // 64)].float()  # a few rows tell the size of all
    size = (x @ some.t()).square().mean().sqrt()
    return (x * (2.0 / size).clamp(max=1000.0)).to(dtype)


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative L2; infinite where there is none."""
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return math.inf
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def _cause(
    config: MoEConfig, weights: MoEWeights, expert: int, x: Tensor, got: Tensor, run: Dense, allowed: float
) -> str:
    """The first mistake that gives ``got``."""
    if got.shape != x.shape:
        return f"it returned {tuple(got.shape)}, expected {tuple(x.shape)}"
    if not bool(got.isfinite().all()):
        return "its output is not finite"
    for text, changed_config, changed in _mistakes(config, _only(config, weights, expert)):
        if _error(got, dense_expert(changed_config, changed, 0, x.float())) <= allowed:
            return text
    for other in range(config.num_held_experts):
        if other != expert and _error(got, dense_expert(config, weights, other, x.float())) <= allowed:
            return f"it computes expert {other}, the experts are in another order"
    return _bias_cause(config, _only(config, weights, expert), x, got, run, allowed) or (
        "none of the likely causes explains it (gate and up, order of rows, orientation, biases, order of experts)"
    )


def _bias_cause(config: MoEConfig, one: MoEWeights, x: Tensor, got: Tensor, run: Dense, allowed: float) -> str | None:
    """Biases with other values: one behind the second product shifts all tokens alike, none shows in large inputs."""
    if one.w2_bias is not None and config.post_expert_norm_eps is None:
        shift = got - dense_expert(config, one, 0, x.float())
        if _error(shift[0], shift[1]) <= allowed:
            return "w2_bias has other values, or is left from earlier weights"
    if one.w13_bias is not None and x.dtype is not torch.float16:
        large = x * _LARGE
        if _error(run(large).float(), dense_expert(config, one, 0, large.float())) <= allowed:
            return "w13_bias, or both biases, have other values, or are left from earlier weights"
    return None


def _mistakes(config: MoEConfig, one: MoEWeights) -> Iterator[tuple[str, MoEConfig, MoEWeights]]:
    """What may have gone wrong, and the config and weights that compute it."""
    w13, w2 = one.w13_weight, one.w2_weight
    assert w13 is not None and w2 is not None

    def rows(text: str, order: Tensor) -> tuple[str, MoEConfig, MoEWeights]:
        bias = None if one.w13_bias is None else one.w13_bias[:, order]
        return text, config, dataclasses.replace(one, w13_weight=w13[:, order], w13_bias=bias)

    if config.gated:
        count = torch.arange(w13.shape[1], device=w13.device)
        packed, alternating = count.view(2, -1), count.view(-1, 2)
        if config.w13_interleaved:
            yield rows("gate and up are swapped", alternating.flip(1).flatten())
            yield rows("w13_weight is read as all gate rows first, it is interleaved", packed.t().flatten())
        else:
            yield rows("gate and up are swapped", packed.flip(0).flatten())
            yield rows("w13_weight is read as interleaved, it has all gate rows first", alternating.t().flatten())
    for field, matrix in (("w13_weight", w13), ("w2_weight", w2)):
        _, out, inside = matrix.shape
        for wrong in (
            matrix.reshape(1, inside, out).transpose(1, 2),
            matrix.transpose(1, 2).reshape(1, out, inside),
        ):
            yield f"{field} is read transposed", config, dataclasses.replace(one, **{field: wrong})
    for fields in (("w13_bias",), ("w2_bias",), ("w13_bias", "w2_bias")):
        if all(getattr(one, field) is not None for field in fields):
            changed = dataclasses.replace(one, **dict.fromkeys(fields))
            yield f"{' and '.join(fields)} left out", config, changed
    for change, what in (
        ({"post_expert_norm_eps": None, "post_expert_norm_scale_first": False}, "the norm behind the experts is"),
        ({"swiglu_limit": None}, "swiglu_limit is"),
        ({"swiglu_alpha": 1.0, "swiglu_beta": 0.0}, "swiglu_alpha and swiglu_beta are"),
    ):
        changed_config = dataclasses.replace(config, **change)
        if changed_config != config:
            yield f"{what} left out", changed_config, one


def _only(config: MoEConfig, weights: MoEWeights, expert: int) -> MoEWeights:
    """The weights of one expert."""
    fields = {"w13_weight", "w2_weight", "w13_bias", "w2_bias", *quantised_parts(config)}
    whole = {"post_expert_norm_weight", "w13_input_scale", "w2_input_scale"}
    kept = {
        name: tensor if name in whole else tensor[expert : expert + 1]
        for name, tensor in weights.named_tensors()
        if name in fields | whole and not name.startswith("shared_")
    }
    return MoEWeights(**kept)


def _rounds_products() -> bool:
    """Whether the process lets float32 products be computed in less than float32."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for one kind of device with the newer interface, so not at its default
        return True


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
