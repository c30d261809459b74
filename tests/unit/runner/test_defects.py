"""Defects of the layer that this one follows, by the letters of docs/runner.md: each shown to be absent."""

from __future__ import annotations

import pytest
import torch

from moe_core import MoEConfig, MoELayer, MoERunner, backends
from moe_core.errors import ConfigError

USABLE = [status.name for status in backends() if status.status == "ok" and "cpu" in status.device_types]


@torch.no_grad()
def routed_to(layer: MoELayer, backend: str, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the ids for given logits."""
    runner, x = MoERunner(layer.config, layer.weights(), backend=backend), torch.ones(len(logits), 16)
    with runner.recording(ids=True) as record:
        out = runner(x, logits)
    return out, record.routed_experts[0]


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_e_no_backend_ignores_bias_or_scaling_factor(backend: str, scoring_func: str) -> None:
    spec = {"scoring_func": scoring_func, "e_score_correction_bias": True}
    layer, logits = MoELayer(MoEConfig(16, 8, 8, 2, **spec)), torch.randn(5, 8)
    layer.e_score_correction_bias[5] = 10
    out, ids = routed_to(layer, backend, logits)
    assert (ids[:, 0] == 5).all()
    scaled = MoELayer(MoEConfig(16, 8, 8, 2, routed_scaling_factor=2.5, **spec))
    scaled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(routed_to(scaled, backend, logits)[0], 2.5 * out)


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_f_one_group_keeps_the_scoring_function(backend: str) -> None:
    """Softmax scores of one row sum up to one and sigmoid scores of large logits do not."""
    layer = MoELayer(MoEConfig(16, 8, 8, 8, scoring_func="sigmoid", num_expert_group=1, topk_group=1))
    ungrouped = MoELayer(MoEConfig(16, 8, 8, 8, scoring_func="sigmoid"))
    softmax = MoELayer(MoEConfig(16, 8, 8, 8))
    for other in (ungrouped, softmax):
        other.load_state_dict(layer.state_dict())
    logits = torch.full((3, 8), 4.0)
    out = routed_to(layer, backend, logits)[0]
    assert torch.equal(out, routed_to(ungrouped, backend, logits)[0])
    torch.testing.assert_close(out, 8 * float(torch.tensor(4.0).sigmoid()) * routed_to(softmax, backend, logits)[0])


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_f_an_impossible_grouping_is_an_error_not_another_router(groups: int) -> None:
    with pytest.raises(ConfigError, match="num_expert_group"):
        MoEConfig(16, 8, 8, 2, scoring_func="sigmoid", num_expert_group=groups, topk_group=1)


def test_g_more_experts_than_the_kept_groups_hold_are_an_error() -> None:
    MoEConfig(16, 8, 8, 4, num_expert_group=4, topk_group=2)
    with pytest.raises(ConfigError, match="the kept groups hold too few experts"):
        MoEConfig(16, 8, 8, 5, num_expert_group=4, topk_group=2)
