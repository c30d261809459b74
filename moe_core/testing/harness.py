"""What the checks of the kit stand on: one layer on the backend under test, the oracle, and their comparison."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor

from .. import reference
from ..api import backends, explain
from ..binding import Binding
from ..config import MoEConfig
from ..errors import SelectionError, UnknownBackendError
from ..platform import device_of
from ..routing import limit_capacity, router_logits_of
from ..runner import MoERunner
from ..types import ExpertsOut, Pending, Plan, Routing
from ..weights import MoEWeights, resolve_config
from .cases import SIZES, random_weights
from .tolerances import tolerance

Fields = Mapping[str, Any]
PLAIN: Final[Fields] = MappingProxyType({"renormalize": True})
FULL: Final[Fields] = {
    "scoring_func": "sigmoid",
    "renormalize": True,
    "e_score_correction_bias": True,
    "num_expert_group": 4,
    "topk_group": 2,
    "group_score": "top2_sum",
    "routed_scaling_factor": 2.5,
    "shared_intermediate_size": 40,
    "shared_expert_gate": True,
}
"""Every stage has something to do, and to forget."""
TOKENS: Final = 13
VOCABULARY: Final = 64
CLOSE_CALL: Final = 1e-5
"""Logits that differ by less, relative to the largest of the row, may be ordered either way by a float32 product."""


def over(cases: Iterable[str] = (), *, dtypes: bool = False) -> Callable[[Any], Any]:
    """Run a check once for each case and, with ``dtypes``, for each dtype of the class."""

    def mark(function: Any) -> Any:
        function.kit_cases, function.kit_dtypes = tuple(cases), dtypes
        return function

    return mark


def expect(holds: object, otherwise: str) -> None:
    """Fail the check with a text that a backend's author can act on."""
    if not bool(holds):
        raise AssertionError(otherwise)


def on_cpu(tensor: Tensor | None) -> Tensor | None:
    """A copy of its own on the CPU."""
    return None if tensor is None else tensor.detach().cpu().clone()


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error in float64; inf for NaN or another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    error = float((a - e).norm() / e.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def expect_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, stage: str, what: str) -> None:
    """Compare by the one table of tolerances."""
    allowed, error = tolerance(dtype, stage), error_of(actual, expected)
    expect(
        error <= allowed,
        f"{what}: relative error {error:.1e} against the reference, allowed {allowed:.0e} ({stage}, {dtype}); shape "
        f"{list(actual.shape)}, expected {list(expected.shape)}",
    )


class Oracle:
    """The reference on the CPU, in float32, from the values that the backend's weights hold."""

    def __init__(self, config: MoEConfig, weights: MoEWeights) -> None:
        copies = {name: on_cpu(tensor) for name, tensor in weights.named_tensors()}
        self.config, self.weights = config, MoEWeights(**copies)
        self.plan = Plan(config, self.weights, torch.device("cpu"), torch.float32)

    def logits(self, x: Tensor) -> Tensor:
        """[T, E] float32."""
        return router_logits_of(self.config, self.weights, x.cpu())

    def gate(self, x: Tensor, logits: Tensor | None = None, input_ids: Tensor | None = None) -> Routing:
        """The gate stage: before a limit of capacity, which is the core's."""
        return reference.moe_gate(self.plan, x.cpu(), on_cpu(logits), on_cpu(input_ids))

    def experts(self, x: Tensor, routing: Routing) -> ExpertsOut:
        """[T, K, H] float32, unweighted."""
        return reference.moe_experts(self.plan, x.cpu(), routing)

    def shared(self, x: Tensor) -> Tensor | None:
        """[T, H] float32, None without shared experts."""
        return reference.moe_shared_experts(self.plan, x.cpu()).result() if self.config.has_shared_experts else None

    def reduce(self, routing: Routing, experts_out: ExpertsOut, shared: Tensor | None) -> Tensor:
        """[T, H] float32."""
        return reference.moe_reduce(self.plan, routing, experts_out, Pending(shared))

    def layer(self, x: Tensor, routing: Routing | None = None, input_ids: Tensor | None = None) -> Tensor:
        """The whole layer."""
        if routing is None:
            routing = self.gate(x, input_ids=input_ids)
            if self.config.expert_capacity is not None:
                routing = limit_capacity(routing, self.config.num_experts, self.config.expert_capacity)
        routing = Routing(routing.topk_weights.cpu(), routing.topk_ids.cpu())
        return self.reduce(routing, self.experts(x, routing), self.shared(x))

    def clear_rows(self, x: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """[T] bool: rows whose experts no rounding of the logits can change."""
        logits = self.logits(x)
        ids = self.gate(x, logits, input_ids).topk_ids
        clear = torch.ones(x.shape[0], dtype=torch.bool)
        generator = torch.Generator().manual_seed(7)
        for _ in range(8):
            noise = torch.rand(logits.shape, generator=generator).mul_(2).sub_(1)
            near = logits + noise * CLOSE_CALL * logits.abs().amax(dim=1, keepdim=True)
            clear &= (self.gate(x, near, input_ids).topk_ids == ids).all(dim=1)
        return clear


@dataclass(frozen=True)
class Subject:
    """One layer bound to the backend under test."""

    backend: str
    runner: MoERunner
    oracle: Oracle

    @property
    def binding(self) -> Binding:
        """The binding that serves calls without gradients."""
        return self.runner.bound(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer."""
        return self.runner.dtype

    @property
    def owns_routing(self) -> bool:
        """Whether the experts stage chooses the experts too."""
        return self.binding.owns_routing

    def serves(self, stage: str) -> bool:
        """Whether the backend itself, not the reference, does this stage."""
        return self.runner.report.stages.get(stage) == self.backend

    def stage(self, name: str) -> Callable[..., Any]:
        """The stage as the runner calls it, its plan filled in; skips where the backend leaves it to another."""
        server = self.runner.report.stages.get(name)
        if server != self.backend:
            pytest.skip(f"{name} is served by {server}, not by {self.backend}")
        if name == "gate" and self.owns_routing:
            pytest.skip(f"the experts of {self.backend} route by themselves: no gate runs")
        function, plan = self.binding.stages[name]
        return functools.partial(function, plan)

    def traits(self) -> Mapping[str, Mapping[str, Any]]:
        """Stage -> traits, of the stages that the backend serves."""
        candidate = self.runner.report.candidate(self.backend)
        assert candidate is not None
        return {stage: candidate.traits[stage] for stage in candidate.stages if self.serves(stage)}

    @property
    def deterministic(self) -> bool:
        """Whether equal calls promise equal bits."""
        return all(traits["deterministic"] for traits in self.traits().values())

    def here(self, tensor: Tensor) -> Tensor:
        """On the layer's device."""
        return tensor.to(self.runner.device)

    def routing(self, routing: Routing) -> Routing:
        """On the layer's device."""
        return Routing(self.here(routing.topk_weights), self.here(routing.topk_ids))

    def hidden(self, tokens: int = TOKENS, seed: int = 1) -> Tensor:
        """Random [T, H]."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, self.oracle.config.hidden_size, generator=generator)
        return self.here(x.to(self.dtype))

    def input_ids(self, tokens: int = TOKENS) -> Tensor | None:
        """Random token ids, where the layer routes by them."""
        if not self.oracle.config.hash_routing:
            return None
        return self.here(torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2)))

    def call(self, x: Tensor, routing: Routing) -> Tensor:
        """The layer with a routing of the caller's."""
        self.need_callers_routing()
        here = self.routing(routing)
        return self.runner(x, topk_weights=here.topk_weights, topk_ids=here.topk_ids)

    def need_callers_routing(self) -> None:
        """Skip where the experts choose by themselves."""
        if self.owns_routing:
            pytest.skip(f"the experts of {self.backend} route by themselves: a caller cannot")

    def expect_same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Equal bits, or equal within the table where the backend does not promise bits."""
        if self.deterministic:
            expect(torch.equal(actual, expected), f"{what}: other bits, although the trait says deterministic")
        else:
            expect_close(actual, expected, self.dtype, "layer", what)

    def expect_layer(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """The layer's output against the oracle."""
        expect_close(actual, expected, self.dtype, "layer", what)


class Harness:
    """Settings of a kit class, and layers bound to its backend."""

    backend: ClassVar[str] = ""
    device: ClassVar[str | None] = None
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16, torch.float16)
    sizes: ClassVar[Fields] = {}
    require_backend: ClassVar[bool] = False

    @functools.cached_property
    def torch_device(self) -> torch.device:
        """``device``, or where the backend can serve a layer here: the accelerator, another of its devices, the CPU."""
        if self.device is not None:
            return torch.device(self.device)
        kinds = [kind for status in backends() if status.name == self.backend for kind in status.device_types]
        return device_of(tuple(kinds))

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The first of ``dtypes`` in which the backend does the plain layer; the first of all if it does none."""
        config = self.config(PLAIN)
        return next((dtype for dtype in self.dtypes if not self.refusal(config, dtype)), self.dtypes[0])

    def config(self, fields: Fields) -> MoEConfig:
        """A small layer; ``fields`` win over ``sizes`` of the class.

        The check at bind is off where a test does not ask for it: it would speak before the test that is more precise.
        """
        return MoEConfig(**{**SIZES, **self.sizes, "check_layout": False, **fields})

    def refusal(self, config: MoEConfig, dtype: torch.dtype, *, needs_grad: bool = False) -> str:
        """Why the backend cannot do it, in its own words; fails where it is broken or unknown."""
        try:
            explain(config, self.torch_device, dtype=dtype, backend=self.backend, needs_grad=needs_grad)
        except UnknownBackendError:
            raise
        except SelectionError as error:
            candidate = getattr(error.report, "candidate", lambda _: None)(self.backend)
            assert candidate is not None
            stages: dict[str, list[str]] = {}
            for stage, (reason, remedy) in candidate.refused.items():
                stages.setdefault(f"{reason.removeprefix(f'{stage} ')} ({remedy})", []).append(stage)
            reasons = [f"{' '.join(names)}: {text}" for text, names in stages.items()]
            why = "; ".join(reasons) or f"{candidate.reason} ({candidate.remedy})"
            if candidate.status in ("broken", "incompatible"):
                pytest.fail(f"{self.backend} is {candidate.status}: {why}")
            if candidate.status in ("unavailable", "disabled"):
                self.unusable(f"{candidate.status}: {why}")
            return why if candidate.reason or reasons else str(error).splitlines()[0]
        return ""

    def need_yes(self, config: MoEConfig, dtype: torch.dtype, *, needs_grad: bool = False) -> None:
        """Skip with the backend's reason where it refuses."""
        why = self.refusal(config, dtype, needs_grad=needs_grad)
        if why:
            pytest.skip(f"{self.backend} says no: {why}")

    def unusable(self, why: str) -> None:
        """The backend cannot run here at all: a skip, or a failure under ``--require-backend``."""
        text = f"{self.backend} cannot be used here: {why}"
        if self.require_backend:
            pytest.fail(f"{text}; it was required (--require-backend)")
        pytest.skip(text)

    def bind(
        self,
        fields: Fields = PLAIN,
        dtype: torch.dtype | None = None,
        *,
        weights: Callable[[MoEWeights], MoEWeights] | None = None,
        needs_grad: bool = False,
        **options: Any,
    ) -> Subject:
        """A layer on the backend; skips with the backend's reason where it refuses.

        Args:
            fields: of MoEConfig, over :data:`SIZES`.
            weights: changes the random weights before the bind.
            options: of MoERunner.
        """
        dtype = dtype or self.dtype
        config = self.config(fields)
        if config.quant is not None:
            quant = dataclasses.replace(config.quant, dtype=str(dtype).removeprefix("torch."))
            config = dataclasses.replace(config, quant=quant)
        drawn = random_weights(config, vocabulary=VOCABULARY, dtype=dtype, device=self.torch_device)
        if weights is not None:
            drawn = weights(drawn)
        config = resolve_config(config, drawn)
        self.need_yes(config, dtype, needs_grad=needs_grad)
        oracle = Oracle(config, drawn)
        return Subject(self.backend, MoERunner(config, drawn, backend=self.backend, **options), oracle)
