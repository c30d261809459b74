"""Layouts of checkpoints, written by hand from canonical weights: what loading and saving are compared with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core import MoEConfig, MoELayer, MoEWeights

H, I, E, K, S = 12, 6, 5, 2, 8
PREFIX = "model.layers.3.mlp"
BASE = MoEConfig(H, I, E, K)
SHARED = MoEConfig(H, I, E, K, shared_intermediate_size=S)
BIASED = MoEConfig(H, I, E, K, expert_bias=True, gate_bias=True)
CORRECTED = MoEConfig(H, I, E, K, scoring_func="sigmoid", e_score_correction_bias=True)

Tensors = dict[str, Tensor]


def random_weights(config: MoEConfig) -> MoEWeights:
    """Every tensor of the config, distinct values."""
    layer = MoELayer(config)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.normal_()
    weights = {name: tensor.detach() for name, tensor in layer.weights().named_tensors()}
    if config.hash_routing:
        weights["tid2eid"] = torch.randint(0, E, (7, K))
    return MoEWeights(**weights)


def each(w: MoEWeights, gate: str, up: str, down: str, stem: str = "experts") -> Tensors:
    """Three linear layers an expert."""
    tensors = {}
    for e in range(E):
        tensors[f"{stem}.{e}.{gate}.weight"], tensors[f"{stem}.{e}.{up}.weight"] = w.w13_weight[e].chunk(2)
        tensors[f"{stem}.{e}.{down}.weight"] = w.w2_weight[e]
    return tensors


def each_ungated(w: MoEWeights, up: str, down: str, stem: str = "experts.") -> Tensors:
    """Two linear layers an expert, with biases where there are some."""
    tensors = {}
    for e in range(E):
        tensors |= {f"{stem}{e}.{up}.weight": w.w13_weight[e], f"{stem}{e}.{down}.weight": w.w2_weight[e]}
        if w.w13_bias is not None:
            tensors |= {f"{stem}{e}.{up}.bias": w.w13_bias[e], f"{stem}{e}.{down}.bias": w.w2_bias[e]}
    return tensors


def fused(w: MoEWeights, w13: str, w2: str, transposed: bool = False) -> Tensors:
    turn = (lambda t: t.transpose(1, 2)) if transposed else (lambda t: t)
    return {w13: turn(w.w13_weight), w2: turn(w.w2_weight)}


def alternating(t: Tensor) -> Tensor:
    """Rows gate, up, gate, up from packed ones."""
    return torch.stack(t.chunk(2, dim=1), dim=2).flatten(1, 2)


def shared(
    w: MoEWeights, stem: str, first: tuple[str, ...] = ("gate_proj", "up_proj"), last: str = "down_proj"
) -> Tensors:
    tensors = dict(zip([f"{stem}.{name}.weight" for name in first], w.shared_w13_weight.chunk(len(first)), strict=True))
    return {**tensors, f"{stem}.{last}.weight": w.shared_w2_weight}


@dataclasses.dataclass
class Case:
    """A layout: what it stores, written by hand. ``options`` are passed to load_weights and detect_layout."""

    name: str
    config: MoEConfig
    write: Callable[[MoEWeights], Tensors]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def gate(w: MoEWeights, name: str = "gate.weight") -> Tensors:
    return {name: w.gate_weight}


def transposed_biased(w: MoEWeights, reorder: Callable[[Tensor], Tensor]) -> Tensors:
    return {
        "experts.gate_up_proj": reorder(w.w13_weight).transpose(1, 2),
        "experts.gate_up_proj_bias": reorder(w.w13_bias),
        "experts.down_proj": w.w2_weight.transpose(1, 2),
        "experts.down_proj_bias": w.w2_bias,
        "router.weight": w.gate_weight,
        "router.bias": w.gate_bias,
    }


def same(t: Tensor) -> Tensor:
    return t


def with_bias(name: str, row: bool = False) -> Callable[[MoEWeights], Tensors]:
    def write(w: MoEWeights) -> Tensors:
        bias = w.e_score_correction_bias
        return {**each(w, "gate_proj", "up_proj", "down_proj"), **gate(w), name: bias[None] if row else bias}

    return write


def routed_by(name: str) -> Callable[[MoEWeights], Tensors]:
    return lambda w: {**each(w, "w1", "w3", "w2"), name: w.gate_weight}


GATED_SHARED = dataclasses.replace(SHARED, shared_expert_gate=True)
UNGATED = MoEConfig(H, I, E, K, gated=False, shared_intermediate_size=S, activation="relu2")

CASES = [
    Case("gate up down", BASE, lambda w: {**each(w, "gate_proj", "up_proj", "down_proj"), **gate(w)}),
    Case("w1 w3 w2", BASE, lambda w: {**each(w, "w1", "w3", "w2"), **gate(w)}),
    Case("fc1 fc3 fc2", BASE, lambda w: {**each(w, "fc1", "fc3", "fc2"), "gate_weight": w.gate_weight}),
    Case(
        "up down, no gate",
        UNGATED,
        lambda w: {**each_ungated(w, "up_proj", "down_proj"), **gate(w), **shared(w, "shared_experts", ("up_proj",))},
    ),
    Case(
        "fc1 fc2, no gate, biases",
        MoEConfig(H, I, E, K, gated=False, activation="relu", expert_bias=True),
        lambda w: {**each_ungated(w, "fc1", "fc2", "experts.expert_"), **gate(w, "router.classifier.weight")},
    ),
    Case(
        "wi wo, no gate",
        MoEConfig(H, I, E, K, gated=False, activation="relu"),
        lambda w: {**each_ungated(w, "wi", "wo", "experts.expert_"), **gate(w, "router.classifier.weight")},
    ),
    Case(
        "fused, an expert",
        BASE,
        lambda w: {**each_ungated(w, "gate_up_proj", "down_proj"), **gate(w)},
        {"interleaved": False},
    ),
    Case("w13, an expert", BASE, lambda w: {**each_ungated(w, "w13", "w2"), **gate(w)}, {"interleaved": False}),
    Case("fused", BASE, lambda w: {**fused(w, "experts.gate_up_proj", "experts.down_proj"), **gate(w)}),
    Case(
        "fused, transposed",
        SHARED,
        lambda w: {
            **fused(w, "experts.gate_up_proj", "experts.down_proj", transposed=True),
            **gate(w, "router.weight"),
            **shared(w, "shared_expert"),
        },
    ),
    Case("fused, transposed, biases", BIASED, lambda w: transposed_biased(w, same), {"interleaved": False}),
    Case("interleaved, transposed, biases", BIASED, lambda w: transposed_biased(w, alternating), {"interleaved": True}),
    Case(
        "interleaved, kept so",
        dataclasses.replace(BIASED, w13_interleaved=True),
        lambda w: transposed_biased(w, same),
    ),
    Case(
        "gate up down into interleaved",
        dataclasses.replace(SHARED, w13_interleaved=True),
        lambda w: {
            **{
                f"experts.{e}.{name}.weight": t
                for e in range(E)
                for name, t in (("gate_proj", w.w13_weight[e][0::2]), ("up_proj", w.w13_weight[e][1::2]))
            },
            **{f"experts.{e}.down_proj.weight": w.w2_weight[e] for e in range(E)},
            **gate(w),
            "shared_expert.gate_proj.weight": w.shared_w13_weight[0::2],
            "shared_expert.up_proj.weight": w.shared_w13_weight[1::2],
            "shared_expert.down_proj.weight": w.shared_w2_weight,
        },
    ),
    Case(
        "input output",
        BASE,
        lambda w: {**fused(w, "input_linear.weight", "output_linear.weight"), **gate(w, "router.layer.weight")},
    ),
    Case(
        "stacked gate and up",
        CORRECTED,
        lambda w: {
            "gate_proj.weight": w.w13_weight[:, :I],
            "up_proj.weight": w.w13_weight[:, I:],
            "down_proj.weight": w.w2_weight,
            "router_bias": w.e_score_correction_bias,
            **gate(w),
        },
    ),
    Case(
        "fc1 fc2, transposed",
        SHARED,
        lambda w: {
            **fused(w, "experts.fc1.weight", "experts.fc2.weight", True),
            **gate(w, "router.weight"),
            **shared(w, "shared_experts"),
        },
    ),
    Case(
        "w13",
        BASE,
        lambda w: {**fused(w, "experts.w13_weight", "experts.w2_weight"), **gate(w)},
        {"interleaved": False},
    ),
    Case(
        "w13, interleaved",
        BASE,
        lambda w: {"experts.w13_weight": alternating(w.w13_weight), "experts.w2_weight": w.w2_weight, **gate(w)},
        {"interleaved": True},
    ),
    Case(
        "stacked w1 w3 w2",
        SHARED,
        lambda w: {
            "experts.w1": w.w13_weight[:, :I],
            "experts.w3": w.w13_weight[:, I:],
            "experts.w2": w.w2_weight,
            **gate(w, "router.gate.weight"),
            **shared(w, "shared_experts", ("w1", "w3"), "w2"),
        },
    ),
    Case(
        "stacked up, no gate",
        dataclasses.replace(UNGATED, shared_intermediate_size=None),
        lambda w: {**fused(w, "experts.up_proj", "experts.down_proj"), **gate(w)},
    ),
    Case(
        "flat",
        BASE,
        lambda w: {
            "experts.mlp.w1": w.w13_weight[:, :I].reshape(-1, H),
            "experts.mlp.v1": w.w13_weight[:, I:].reshape(-1, H),
            "experts.mlp.w2": w.w2_weight.transpose(1, 2).reshape(-1, H),
            **gate(w, "router.layer.weight"),
        },
    ),
    Case(
        "moe_core's own names",
        dataclasses.replace(GATED_SHARED, expert_bias=True, shared_expert_bias=True, e_score_correction_bias=True),
        lambda w: dict(w.named_tensors()),
    ),
    *(
        Case(f"bias {name}", CORRECTED, with_bias(name))
        for name in (
            "gate.e_score_correction_bias",
            "e_score_correction_bias",
            "experts.e_score_correction_bias",
            "expert_bias",
            "gate.expert_bias",
            "gate.bias",
        )
    ),
    Case("bias moe_statics", CORRECTED, with_bias("moe_statics.e_score_correction_bias", row=True)),
    Case(
        "router's bias gate.bias",
        MoEConfig(H, I, E, K, gate_bias=True),
        lambda w: {**each(w, "w1", "w3", "w2"), **gate(w), "gate.bias": w.gate_bias},
    ),
    *(
        Case(f"router {name}", BASE, routed_by(name))
        for name in ("router.gate.weight", "router.layer.weight", "gate.wg.weight")
    ),
    *(
        Case(
            f"shared {stem}",
            SHARED,
            lambda w, stem=stem: {**each(w, "gate_proj", "up_proj", "down_proj"), **gate(w), **shared(w, stem)},
        )
        for stem in ("shared_expert", "shared_experts", "shared_mlp")
    ),
    Case(
        "shared fused",
        SHARED,
        lambda w: {
            **fused(w, "experts.gate_up_proj", "experts.down_proj"),
            **gate(w),
            **shared(w, "shared_experts", ("gate_up_proj",)),
        },
    ),
    Case(
        "shared gate",
        GATED_SHARED,
        lambda w: {
            **each(w, "gate_proj", "up_proj", "down_proj"),
            **gate(w),
            **shared(w, "shared_expert"),
            "shared_expert_gate.weight": w.shared_gate_weight,
        },
    ),
    Case(
        "no router",
        BASE,
        lambda w: fused(w, "experts.gate_up_proj", "experts.down_proj"),
    ),
    Case(
        "zero experts",
        MoEConfig(H, I, E, K, zero_expert_num=3, zero_expert_type="identity"),
        lambda w: {**each(w, "gate_proj", "up_proj", "down_proj"), **gate(w, "router.classifier.weight")},
    ),
    Case(
        "per-expert scale",
        MoEConfig(H, I, E, K, per_expert_scale=True),
        lambda w: {
            **fused(w, "experts.gate_up_proj", "experts.down_proj"),
            **gate(w),
            "router.per_expert_scale": w.per_expert_scale,
        },
    ),
    Case(
        "ids by token",
        MoEConfig(H, I, E, K, hash_routing=True),
        lambda w: {**each(w, "w1", "w3", "w2"), **gate(w), "gate.tid2eid": w.tid2eid},
    ),
    Case(
        "latent",
        MoEConfig(H, I, E, K, moe_latent_size=10),
        lambda w: {**each(w, "gate_proj", "up_proj", "down_proj"), **gate(w)},
    ),
]
BESIDE = Case(
    "shared beside the layer",
    SHARED,
    lambda w: {
        **fused(w, "input_linear.weight", "output_linear.weight"),
        **gate(w, "router.layer.weight"),
        "../shared_mlp.input_linear.weight": w.shared_w13_weight,
        "../shared_mlp.output_linear.weight": w.shared_w2_weight,
    },
)
CASES.append(BESIDE)


def write(path: Path, case: Case, prefix: str = PREFIX) -> MoEWeights:
    """A checkpoint of one layer among other tensors; returns what a load must give."""
    weights = random_weights(case.config)
    if case.name == "no router":
        weights.gate_weight = None
    tensors = {"model.embed_tokens.weight": torch.zeros(3, H), "model.layers.3.input_layernorm.weight": torch.ones(H)}
    parent = prefix.rpartition(".")[0]
    for name, tensor in case.write(weights).items():
        full = f"{parent}.{name[3:]}" if name.startswith("../") else f"{prefix}.{name}"
        tensors[full] = tensor.clone().contiguous()
    save_file(tensors, path)
    return weights


def assert_equal_weights(found: MoEWeights, wanted: MoEWeights) -> None:
    found_tensors, wanted_tensors = dict(found.named_tensors()), dict(wanted.named_tensors())
    assert found_tensors.keys() == wanted_tensors.keys()
    for name, tensor in wanted_tensors.items():
        assert found_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found_tensors[name], tensor), name


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def shards(folder: Path) -> dict[str, MoEWeights]:
    """Two layers of fused experts and one of single ones, a file each, and an index."""
    wanted, index = {}, {}
    for i, name in enumerate(["gate up down", "fused", "fused, transposed, biases"]):
        file, prefix = f"model-{i}-of-3.safetensors", f"model.layers.{10 * i}.mlp"
        wanted[prefix] = write(folder / file, by_name(name), prefix)
        index |= dict.fromkeys(load_file(folder / file), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return wanted
