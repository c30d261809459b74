"""Weights and inputs as they come: expert maps, strides, sizes that no block divides, layouts of gate and up."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from moe_core import MoEConfig, MoEWeights, explain, fused_experts
from moe_core.errors import ConfigError, WeightsError
from moe_core.testing import EXPERT_VARIANTS, SIZES, random_weights

E, H, I, K = 16, 32, 24, 4


def config_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{**SIZES, **fields})


def given_routing(tokens: int, k: int = K, experts: int = E) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :k].int()
    ids[::5, -1] = -1
    return torch.rand(tokens, k), ids


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_regression_21_expert_maps_of_all_ranks_sum_to_the_whole(backend: str, ranks: int) -> None:
    """Experts of another rank, id -1, were read as the last one, or left rows that nobody wrote."""
    config = config_of()
    weights, x, (topk_weights, ids) = random_weights(config), torch.randn(40, H), given_routing(40)
    w13, w2 = weights.w13_weight, weights.w2_weight
    owner = torch.randint(0, ranks, (E,))
    if ranks == 5:
        owner[owner == 2] = 1  # a rank without experts
    poisoned = topk_weights.masked_fill(ids < 0, float("nan"))  # 0 * NaN must not come back
    total = torch.zeros(40, H)
    for rank in range(ranks):
        mine = torch.nonzero(owner == rank)[:, 0]
        expert_map = torch.full((E,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        part = fused_experts(x, w13[mine], w2[mine], poisoned, ids, expert_map=expert_map, backend=backend)
        assert torch.isfinite(part).all()
        total += part
    dense.assert_near(total, dense.routed(config, weights, x, topk_weights, ids))


@torch.no_grad()
def test_regression_21_nan_of_experts_that_are_not_chosen_stays_there(backend: str) -> None:
    """Weights that were never loaded, of experts that a rank does not use, reached the sum as 0 * NaN."""
    config = config_of()
    weights, x, (topk_weights, ids) = random_weights(config), torch.randn(20, H), given_routing(20)
    wanted = dense.routed(config, weights, x, topk_weights, ids.masked_fill(ids == 3, -1))
    weights.w13_weight[3], weights.w2_weight[3] = float("nan"), float("nan")
    ids = ids.masked_fill(ids == 3, -1)
    found = dense.bind(backend, config, weights)(x, topk_weights=topk_weights, topk_ids=ids)
    dense.assert_near(found, wanted)


def test_regression_21_gradients_do_not_see_experts_that_are_not_chosen(backend: str) -> None:
    """The same through a backward pass: neither input nor other experts get NaN."""
    config = config_of()
    weights, (topk_weights, ids) = random_weights(config), given_routing(20)
    with torch.no_grad():
        weights.w13_weight[3], weights.w2_weight[3] = float("nan"), float("nan")
    ids = ids.masked_fill(ids == 3, -1)
    x = torch.randn(20, H, requires_grad=True)
    weights.w13_weight.requires_grad_()
    topk_weights.requires_grad_()
    found = dense.bind(backend, config, weights)(x, topk_weights=topk_weights, topk_ids=ids)
    found.square().sum().backward()
    for gradient in (x.grad, topk_weights.grad, weights.w13_weight.grad):
        assert torch.isfinite(gradient).all()
    assert topk_weights.grad[ids < 0].abs().sum() == 0


def strided_inputs(x: Tensor) -> dict[str, Tensor]:
    tokens = x.shape[0]
    wide = torch.full((tokens, 3 * H), float("nan"))
    wide[:, H : 2 * H] = x
    tall = torch.full((2 * tokens + 1, H), float("nan"))
    tall[1::2] = x
    return {
        "columns": wide[:, H : 2 * H],
        "rows": tall[1::2],
        "transposed": x.t().contiguous().t(),
        "offset": torch.cat([torch.full((7,), float("nan")), x.flatten()])[7:].view(tokens, H),
        "channels first": x.view(1, tokens, H).transpose(0, 1).contiguous().transpose(0, 1)[0],
    }


@torch.no_grad()
def test_regression_22_strided_inputs(backend: str) -> None:
    """A kernel read slices and transposes as if they were contiguous."""
    config = config_of(renormalize=True, shared_intermediate_size=40, shared_expert_gate=True)
    runner, x = dense.bind(backend, config), torch.randn(9, H)
    wanted = runner(x)
    for name, strided in strided_inputs(x).items():
        assert torch.equal(runner(strided), wanted), name
    assert torch.equal(runner(x[:1].expand(9, H)), runner(x[:1].repeat(9, 1))), "stride 0"
    logits, (topk_weights, ids) = torch.randn(9, E), given_routing(9)
    assert torch.equal(runner(x, logits.t().contiguous().t()), runner(x, logits))
    strided = {"topk_weights": topk_weights.t().contiguous().t(), "topk_ids": ids.t().contiguous().t()}
    assert torch.equal(runner(x, **strided), runner(x, topk_weights=topk_weights, topk_ids=ids))
    one = {"topk_weights": topk_weights[:1].expand(9, K), "topk_ids": ids[:1].expand(9, K)}
    assert torch.equal(runner(x, **one), runner(x, **{name: t.contiguous() for name, t in one.items()}))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transposed", "slice", "expanded"])
def test_regression_22_strided_weights(backend: str, kind: str) -> None:
    """Transposed checkpoints and views into larger tensors were read by their shape alone."""
    config = config_of(expert_bias=True, shared_intermediate_size=40)
    weights, x = random_weights(config), torch.randn(9, H)
    if kind == "expanded":
        names = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
        for name in names:
            tensor = getattr(weights, name)
            setattr(weights, name, tensor[:1].expand_as(tensor))
    strided = MoEWeights()
    for name, tensor in weights.named_tensors():
        view = tensor
        if kind == "transposed" and tensor.ndim > 1:
            view = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif kind == "slice":
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
            wide[..., 1::2] = tensor
            view = wide[..., 1::2]
        setattr(strided, name, view)
    dense.assert_near(dense.bind(backend, config, strided)(x), dense.layer(config, weights, x))


ODD = [
    {"hidden_size": 97, "intermediate_size": 130, "num_experts": 3, "top_k": 3},
    {"hidden_size": 1, "intermediate_size": 1, "num_experts": 1, "top_k": 1},
    {"hidden_size": 33, "intermediate_size": 7, "num_experts": 13, "top_k": 13, "expert_bias": True},
    {"hidden_size": 16, "intermediate_size": 8, "num_experts": 384, "top_k": 8, "renormalize": True},
    {"hidden_size": 31, "intermediate_size": 17, "zero_expert_num": 3, "zero_expert_type": "identity", "top_k": 19},
    {"hidden_size": 97, "intermediate_size": 130, "gated": False, "shared_intermediate_size": 45},
    {"hidden_size": 97, "intermediate_size": 65, "w13_interleaved": True, "shared_intermediate_size": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", ODD, ids=str)
def test_regression_23_sizes_that_no_block_divides(backend: str, fields: dict, dtype: torch.dtype) -> None:
    """The tail of an odd hidden, intermediate or zero-expert row was lost, or filled from the next one."""
    config = config_of(**fields)
    weights, x = random_weights(config, dtype=dtype), torch.randn(13, config.hidden_size).to(dtype)
    dense.assert_near(dense.bind(backend, config, weights)(x), dense.layer(config, weights, x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_regression_24_interleaved_and_packed_rows_are_one_layer(backend: str, bias: bool) -> None:
    """Interleaved rows were read as packed ones, and gate for up: plausible numbers, wrong text."""
    packed, interleaved = config_of(expert_bias=bias), config_of(expert_bias=bias, w13_interleaved=True)
    weights, x = random_weights(packed), torch.randn(9, H)
    other, swapped = (MoEWeights(**dict(weights.named_tensors())) for _ in range(2))
    for name in ("w13_weight", "w13_bias") if bias else ("w13_weight",):
        gate, up = getattr(weights, name).chunk(2, dim=1)
        setattr(other, name, torch.stack([gate, up], dim=2).flatten(1, 2))
        setattr(swapped, name, torch.cat([up, gate], dim=1))
    wanted = dense.layer(packed, weights, x)
    dense.assert_near(dense.bind(backend, packed, weights)(x), wanted)
    dense.assert_near(dense.bind(backend, interleaved, other)(x), wanted)
    for config, wrong in ((packed, other), (packed, swapped), (interleaved, weights)):
        found = dense.bind(backend, config, wrong)(x)
        assert (found - wanted).norm() > 0.1 * wanted.norm(), "the layouts are told apart"


@torch.no_grad()
def test_regression_24_biases_are_added_once(backend: str) -> None:
    """The bias of the second product was added once a rank, or once whatever the weights of the experts."""
    config = config_of(expert_bias=True)
    weights, x, (topk_weights, ids) = random_weights(config), torch.randn(9, H), given_routing(9)
    weights.w2_weight.zero_()
    found = dense.bind(backend, config, weights)(x, topk_weights=topk_weights, topk_ids=ids)
    wanted = (topk_weights[..., None] * weights.w2_bias[ids.clamp(min=0).long()]).masked_fill(ids[..., None] < 0, 0)
    dense.assert_near(found, wanted.sum(1).double())


@pytest.mark.parametrize("name", ["w13_weight", "w2_weight", "shared_w13_weight", "shared_w2_weight"])
def test_regression_24_a_transposed_weight_is_refused_by_its_shape(name: str) -> None:
    """A transposed layout was loaded as it was; where sizes differ it is an error that says transpose."""
    config = config_of(shared_intermediate_size=40)
    weights = random_weights(config)
    setattr(weights, name, getattr(weights, name).transpose(-1, -2).contiguous())
    with pytest.raises(WeightsError, match=f"{name} has shape .* transpose"):
        dense.MoERunner(config, weights)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPERT_VARIANTS)
def test_expert_variants_equal_the_oracle(backend: str, name: str, dtype: torch.dtype) -> None:
    """Activations, gating, clamps, biases, norms and weights on the input, for one row and for several."""
    config = config_of(**EXPERT_VARIANTS[name])
    weights, x = random_weights(config, dtype=dtype), torch.randn(19, H).to(dtype)
    runner, wanted = dense.bind(backend, config, weights), dense.layer(config, weights, x)
    dense.assert_near(runner(x), wanted)
    assert torch.equal(runner(x[3:4]), runner(x)[3:4])


@torch.no_grad()
def test_a_limit_of_zero_is_refused_and_none_is_no_limit(backend: str) -> None:
    """A default swiglu_limit of 0 that meant "none" clamped every activation to nothing."""
    with pytest.raises(ConfigError, match="0 would clamp everything"):
        config_of(swiglu_limit=0.0)
    free, limited = config_of(swiglu_limit=None), config_of(swiglu_limit=1e30)
    weights, x = random_weights(free), 100 * torch.randn(9, H)
    dense.assert_near(dense.bind(backend, free, weights)(x), dense.bind(backend, limited, weights)(x).double())


def test_every_usable_backend_serves_every_variant_or_says_why(backend: str) -> None:
    """A refusal has a reason and a remedy; nothing is refused by crashing."""
    for fields in EXPERT_VARIANTS.values():
        for reason, remedy in explain(config_of(**fields), "cpu").candidate(backend).refused.values():
            assert reason and remedy
