"""Whole layers against the reference: the tables, edges each with its reason, and memory that is not the layer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..functional import fused_experts
from ..types import Routing
from ..weights import MoEWeights
from .cases import SHARED_VARIANTS
from .harness import FULL, PLAIN, TOKENS, Fields, Subject, expect, expect_close, over
from .stage_checks import EXPERTS, ROUTERS, StageChecks

LAYERS = {"plain": PLAIN, "full": FULL, **ROUTERS, **EXPERTS, **SHARED_VARIANTS}
ORDERS = ("overlap", "before", "after", "internal")


@dataclass(frozen=True)
class Edge:
    """A layer or a batch at the border of what a kernel was written for.

    ``ids(tokens, top_k, experts)`` are the caller's; without it the layer routes.
    """

    why: str
    fields: Fields = field(default_factory=lambda: PLAIN)
    tokens: int = TOKENS
    ids: Callable[[int, int, int], Tensor] | None = None


def hot(tokens: int, k: int, experts: int) -> Tensor:
    """Column 0 is expert 0 for every token; the others spread over the rest."""
    spread = torch.arange(tokens * (k - 1)).view(tokens, k - 1) % (experts - 1) + 1
    return torch.cat([torch.zeros(tokens, 1, dtype=torch.long), spread], dim=1)


EDGES = {
    "one_token": Edge("decoding: kernels for one row sum in another order", FULL, 1),
    "two_tokens": Edge("fewer tokens than experts", FULL, 2),
    "tile_minus_one": Edge("one row short of a tile", FULL, 63),
    "tile": Edge("exactly a tile", FULL, 64),
    "tile_plus_one": Edge("a tail of one row, which clamped loops drop or repeat", FULL, 65),
    "top_1": Edge("K = 1: squeezes drop a dimension", {"top_k": 1}),
    "all_experts": Edge("K = E: nothing is left out, no k+1-th score", {"num_experts": 8, "top_k": 8, **PLAIN}),
    "one_expert": Edge("E = 1: softmax over one", {"num_experts": 1, "top_k": 1}),
    "prime_experts": Edge("E is prime: no tile of experts fits", {"num_experts": 13, "top_k": 3}),
    "many_experts": Edge("most experts get no token", {"num_experts": 96, "top_k": 2}, 5),
    "odd_hidden": Edge("H odd: rows are not aligned", {"hidden_size": 33}),
    "odd_intermediate": Edge("I odd: a tail in the second product", {"intermediate_size": 25, "expert_bias": True}),
    "wider_than_tiles": Edge("H and I just over a tile", {"hidden_size": 130, "intermediate_size": 65}),
    "all_to_one": Edge(
        "every token to one expert: bounds of T rows an expert",
        {"top_k": 1},
        257,
        lambda t, k, e: torch.full((t, k), e - 1),
    ),
    "hot_expert": Edge("one expert gets T rows, the others few", {}, 65, hot),
    "empty_experts": Edge(
        "the first and the last expert only", {"top_k": 2}, 9, lambda t, k, e: torch.tensor([[0, e - 1]] * t)
    ),
    "repeated_ids": Edge("a caller may choose an expert twice", {"top_k": 2}, 9, lambda t, k, e: torch.full((t, k), 3)),
    "no_expert_at_all": Edge("every id is -1", {"top_k": 2}, 9, lambda t, k, e: torch.full((t, k), -1)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns_of_a_wider_tensor": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every_other_row": lambda x: torch.repeat_interleave(x, 2, dim=0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand_as(x),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


def poisoned(tensor: Tensor) -> Tensor:
    """The same values with NaN (or huge ids) in the memory before and behind them."""
    evil: Any = float("nan") if tensor.is_floating_point() else 2**30
    around = torch.full((tensor.shape[0] + 16, *tensor.shape[1:]), evil, dtype=tensor.dtype, device=tensor.device)
    inside = around[8:-8]
    inside.copy_(tensor)
    return inside


class LayerChecks(StageChecks):
    """Stages together."""

    @over(LAYERS)
    def test_layer(self, case: str) -> None:
        """From hidden states (rows without a close call), from logits, and from a routing of the caller's.

        Bound as a user would bind it, the check of one expert included.
        """
        self.check_layer(self.bind({**LAYERS[case], "check_layout": True}))

    @over(["plain", "full"], dtypes=True)
    def test_layer_dtype(self, case: str, dtype: torch.dtype) -> None:
        """The same in every dtype that the backend accepts."""
        self.check_layer(self.bind({**LAYERS[case], "check_layout": True}, dtype))

    def check_layer(self, subject: Subject) -> None:
        """All three ways in."""
        oracle, x, input_ids = subject.oracle, subject.hidden(31), subject.input_ids(31)
        clear, expected = oracle.clear_rows(x, input_ids), oracle.layer(x, input_ids=input_ids)
        if oracle.config.expert_capacity is not None:
            clear = clear.all().expand_as(clear)  # one close call moves the places of others
        out = subject.runner(x, input_ids=input_ids)
        expect(out.dtype is x.dtype and out.device == x.device, f"output {out.dtype} on {out.device}, input {x.dtype}")
        expect(out.shape == x.shape, f"output has shape {list(out.shape)}, input {list(x.shape)}")
        subject.expect_layer(out.cpu()[clear], expected[clear], "from hidden_states")
        out = subject.runner(x, subject.here(oracle.logits(x)), input_ids=input_ids)
        subject.expect_layer(out.cpu()[clear], expected[clear], "from router_logits")
        if not subject.owns_routing:
            # Not what its own gate would choose for these rows.
            routing = Routing(*(tensor.roll(1, 0) for tensor in oracle.gate(x, input_ids=input_ids)))
            subject.expect_layer(subject.call(x, routing), oracle.layer(x, routing), "from topk_weights and topk_ids")

    @over(EDGES, dtypes=True)
    def test_edge(self, case: str, dtype: torch.dtype) -> None:
        """Sizes and loads at the border; EDGES has the reason of each."""
        edge = EDGES[case]
        subject = self.bind(edge.fields, dtype)
        oracle, config, x = subject.oracle, subject.oracle.config, subject.hidden(edge.tokens)
        routing = oracle.gate(x)
        if edge.ids is not None:
            ids = edge.ids(edge.tokens, config.top_k, config.num_experts).int()
            routing = Routing(routing.topk_weights, ids)
        if edge.ids is None and subject.owns_routing:
            out = subject.runner(x, subject.here(oracle.logits(x)))
        else:
            out = subject.call(x, routing)
        subject.expect_layer(out, oracle.layer(x, routing), edge.why)

    @over(LAYOUTS)
    def test_layout(self, case: str) -> None:
        """Inputs that are views: the values count, not the strides."""
        subject = self.bind(FULL)
        x = LAYOUTS[case](subject.hidden())
        dense = x.contiguous().clone()
        logits = subject.here(subject.oracle.logits(dense))
        expected = subject.oracle.layer(dense)
        subject.expect_layer(subject.runner(x, LAYOUTS[case](logits) if case != "expanded" else logits), expected, case)
        if not subject.owns_routing:
            routing = subject.oracle.gate(dense)
            weights, ids = (LAYOUTS[case](tensor) for tensor in routing)
            out = subject.call(x, Routing(weights, ids))
            subject.expect_layer(out, subject.oracle.layer(dense, Routing(weights, ids)), f"routing, {case}")

    @over(["vector", "three_dimensions", "no_tokens", "no_tokens_in_a_batch"])
    def test_shape(self, case: str) -> None:
        """[..., H] of any rank, T = 0 included."""
        subject = self.bind(FULL)
        x = subject.hidden(12)
        shaped = {"vector": x[0], "three_dimensions": x.view(3, 4, -1), "no_tokens": x[:0]}.get(
            case, x.view(3, 4, -1)[:0]
        )
        out = subject.runner(shaped)
        expect(out.shape == shaped.shape, f"input {list(shaped.shape)}, output {list(out.shape)}")
        flat = shaped.reshape(-1, x.shape[1])
        subject.expect_layer(out.reshape(flat.shape), subject.oracle.layer(flat), case)

    def test_weight_views(self) -> None:
        """Weights that are transposed views, as checkpoints with another layout give them."""

        def transposed(weights: MoEWeights) -> MoEWeights:
            views = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in weights.named_tensors()}
            return MoEWeights(**views)

        subject = self.bind({**FULL, "expert_bias": True}, weights=transposed)
        x = subject.hidden()
        logits = subject.here(subject.oracle.logits(x))
        subject.expect_layer(subject.runner(x, logits), subject.oracle.layer(x), "weights as transposed views")

    @over(["inputs", "weights"])
    def test_neighbours(self, case: str) -> None:
        """Memory before and behind a tensor belongs to others: NaN there changes nothing."""

        def surrounded(weights: MoEWeights) -> MoEWeights:
            return MoEWeights(**{name: poisoned(tensor) for name, tensor in weights.named_tensors()})

        subject = self.bind({**FULL, "expert_bias": True}, weights=surrounded if case == "weights" else None)
        x = subject.hidden()
        around = poisoned if case == "inputs" else torch.Tensor.clone
        logits = subject.here(subject.oracle.logits(x))
        expected = subject.oracle.layer(x)
        subject.expect_layer(subject.runner(around(x), around(logits)), expected, f"NaN beside the {case}")
        if not subject.owns_routing:
            routing = subject.routing(subject.oracle.gate(x))
            out = subject.runner(
                around(x), topk_weights=around(routing.topk_weights), topk_ids=around(routing.topk_ids)
            )
            subject.expect_layer(out, expected, f"NaN beside the {case} and the routing")

    def test_unchosen_expert(self) -> None:
        """An expert that nobody chose is not read: 0 * NaN is NaN."""

        def spoiled(weights: MoEWeights) -> MoEWeights:
            tensors = dict(weights.named_tensors())
            for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
                tensors[name] = tensors[name].clone()
                tensors[name][5] = float("nan")
            return MoEWeights(**tensors)

        subject = self.bind({"top_k": 2, "expert_bias": True}, weights=spoiled)
        x = subject.hidden()
        ids = (torch.arange(2 * TOKENS).view(TOKENS, 2) % 5).int()
        routing = Routing(torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(4)), ids)
        subject.expect_layer(subject.call(x, routing), subject.oracle.layer(x, routing), "NaN in an unchosen expert")

    def test_bad_row(self) -> None:
        """A token of NaN or inf spoils its own row and no other."""
        subject = self.bind(FULL)
        x = subject.hidden()
        logits = subject.here(subject.oracle.logits(x))
        expected = subject.oracle.layer(x)
        bad = x.clone()
        bad[3], bad[8] = float("nan"), float("inf")
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[[3, 8]] = False
        out = subject.runner(bad, logits).cpu()
        subject.expect_layer(out[others], expected[others], "rows beside one of NaN")
        expect(out[3].isnan().all(), "a row of NaN came out as numbers: its values were not used")

    def test_batch(self) -> None:
        """A row is the same within the table in any batch and at any place in it."""
        subject = self.bind(FULL)
        x = subject.hidden(24)
        logits = subject.here(subject.oracle.logits(x))
        whole = subject.runner(x, logits)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(5)).to(x.device)
        shuffled = subject.runner(x[order].contiguous(), logits[order].contiguous())
        expect_close(shuffled, whole[order].cpu(), subject.dtype, "layer", "rows in another order")
        alone = torch.cat([subject.runner(x[i : i + 1], logits[i : i + 1]) for i in range(24)])
        expect_close(alone, whole.cpu(), subject.dtype, "layer", "rows one by one")

    @over(["1", "7", "8", "23", "24", "25"])
    def test_chunks(self, case: str) -> None:
        """A bound on memory changes no value: 24 tokens in chunks of any size, tails included."""
        whole, parts = self.bind(FULL), self.bind({**FULL, "max_chunk_tokens": int(case)})
        x = whole.hidden(24)
        logits = whole.here(whole.oracle.logits(x))
        expected = whole.runner(x, logits).cpu()
        expect_close(parts.runner(x, logits), expected, whole.dtype, "layer", f"chunks of {case}")

    @over(ORDERS)
    def test_shared_order(self, case: str) -> None:
        """Shared experts before, after, beside or inside the routed ones: the same sum, of the same input."""
        for inplace in (False, True):
            subject = self.bind({**FULL, "shared_experts_order": case}, inplace=inplace)
            x = subject.hidden()
            expected, logits = subject.oracle.layer(x), subject.here(subject.oracle.logits(x))
            subject.expect_layer(subject.runner(x, logits), expected, f"order {case}, inplace={inplace}")

    def test_latent(self) -> None:
        """Routed experts in a narrower space; gate and shared experts outside it."""
        down = torch.randn(16, self.config(FULL).hidden_size, generator=torch.Generator().manual_seed(6)).div_(4)

        def through(matrix: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: x @ matrix.to(x.device, x.dtype).t()

        fields = {**FULL, "moe_latent_size": 16}
        into, out_of = through(down), through(down.t().contiguous())
        subject = self.bind(fields, routed_input_transform=into, routed_output_transform=out_of)
        x, oracle = subject.hidden(), subject.oracle
        routing = oracle.gate(x)
        inner = oracle.reduce(routing, oracle.experts(into(x), routing), None)
        shared = oracle.shared(x)
        assert shared is not None
        subject.expect_layer(subject.call(x, routing), out_of(inner) + shared, "latent experts")

    def test_expert_map(self) -> None:
        """fused_experts: halves of the experts add up to the whole, and foreign ids contribute nothing."""
        subject = self.bind({"top_k": 2})
        subject.need_callers_routing()
        held = subject.oracle.config.num_experts // 2
        self.need_yes(self.config({"num_experts": held, "num_local_experts": held, "top_k": 2}), subject.dtype)
        x, weights = subject.hidden(), subject.runner.weights
        routing = subject.routing(subject.oracle.gate(x))
        w13, w2 = weights.w13_weight, weights.w2_weight
        assert w13 is not None and w2 is not None
        total = torch.zeros(x.shape)
        for start in (0, held):
            mine = torch.arange(w13.shape[0], device=x.device) - start
            expert_map = mine.masked_fill((mine < 0) | (mine >= held), -1).int()
            part = slice(start, start + held)
            half = fused_experts(x, w13[part], w2[part], *routing, expert_map=expert_map, backend=self.backend)
            total += half.float().cpu()
        subject.expect_layer(total, subject.oracle.layer(x, routing), "the sum of two halves")
