"""Checkpoints that do not fit: a typed error each, which names the tensor, what was found and what was expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    BASE,
    CORRECTED,
    PREFIX,
    SHARED,
    E,
    H,
    I,
    K,
    Tensors,
    by_name,
    random_weights,
    shards,
    write,
)
from safetensors.torch import load_file, save_file

from moe_core import MoEConfig, QuantConfig
from moe_core.checkpoints import Entry, Layout, layer_prefixes, load_weights, save_weights
from moe_core.errors import CheckpointError, MoECoreError, WeightsError

# What is wrong with a checkpoint: the case it is made from, how it is changed, how it is loaded, what the error says.
Change = Callable[[Tensors], Any]


def drop(*names: str) -> Change:
    return lambda t: [t.pop(f"{PREFIX}.{name}") for name in names]


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda t: t.update({f"{PREFIX}.{name}": torch.zeros(shape, dtype=dtype)})


WRONG: list[tuple[str, str, Change, dict[str, Any], str]] = [
    ("a missing expert", "gate up down", drop("experts.4.up_proj.weight"), {}, "experts.4.up_proj.weight is missing"),
    (
        "a missing matrix",
        "fused",
        drop("experts.down_proj"),
        {},
        "found: experts.gate_up_proj, gate.weight; known: experts.{e}.gate_proj.weight, experts.{e}.up_proj",
    ),
    ("one expert more", "w1 w3 w2", add("experts.5.w1.weight", I, H), {}, "experts.5.w1.weight: config.num_experts=5"),
    (
        "another number of experts",
        "fused",
        lambda t: None,
        {"config": MoEConfig(H, I, 4, K)},
        "experts.gate_up_proj in",
    ),
    (
        "another width",
        "gate up down",
        lambda t: None,
        {"config": MoEConfig(H, I + 1, E, K)},
        "has shape (6, 12), expected (7, 12)",
    ),
    (
        "no gate in the config",
        "gate up down",
        lambda t: None,
        {"config": MoEConfig(H, I, E, K, gated=False)},
        "gated=False",
    ),
    (
        "something else",
        "gate up down",
        add("norm.weight", H),
        {},
        "unexpected tensors below 'model.layers.3.mlp.': norm.weight; they would be lost",
    ),
    ("a name that only begins like one", "gate up down", add("gate.weight_1", E, H), {}, "gate.weight_1"),
    ("a name that only ends like one", "gate up down", add("my_gate.weight", E, H), {}, "my_gate.weight"),
    (
        "a number with a zero before it",
        "gate up down",
        add("experts.01.up_proj.weight", I, H),
        {},
        "unexpected tensors",
    ),
    (
        "two routers",
        "gate up down",
        add("router.weight", E, H),
        {},
        "could be gate_weight: gate.weight or router.weight",
    ),
    ("two biases", "bias expert_bias", add("gate.expert_bias", E), {}, "could be e_score_correction_bias"),
    ("two kinds of experts", "gate up down", add("experts.gate_up_proj", E, 2 * I, H), {}, "unexpected tensors"),
    (
        "two kinds of whole experts",
        "gate up down",
        lambda t: [
            add(f"experts.{e}.{n}.weight", *s)(t)
            for e in range(E)
            for n, s in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I)))
        ],
        {},
        "more than one layout of experts",
    ),
    (
        "shared experts that the config lacks",
        "shared gate",
        lambda t: None,
        {"config": BASE},
        "shared_expert.gate_proj.weight is there, but config.shared_intermediate_size=None",
    ),
    (
        "a shared gate that the config lacks",
        "shared gate",
        lambda t: None,
        {"config": SHARED},
        "shared_expert_gate.weight is there, but config.shared_expert_gate=False",
    ),
    (
        "shared experts that are not there",
        "gate up down",
        lambda t: None,
        {"config": SHARED},
        "no tensor below 'model.layers.3.mlp.' for shared_w13_weight, shared_w2_weight",
    ),
    ("a bias that is not there", "gate up down", lambda t: None, {"config": CORRECTED}, "for e_score_correction_bias"),
    (
        "an unclear bias",
        "bias gate.bias",
        lambda t: None,
        {"config": BASE},
        "may be the router's bias (added to the logits) or the correction bias",
    ),
    (
        "an unclear order of rows",
        "fused, transposed, biases",
        lambda t: None,
        {"interleaved": None},
        "experts.gate_up_proj: its rows may be gate, up, gate, up, or all gate rows first",
    ),
    (
        "an unclear orientation",
        "fused",
        lambda t: t.update({f"{PREFIX}.experts.down_proj": torch.zeros(E, H, I + 1)}),
        {},
        "expected [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]",
    ),
    (
        "mixed dtypes",
        "w1 w3 w2",
        add("experts.2.w1.weight", I, H, dtype=torch.float16),
        {},
        "torch.float16, torch.float32; expected one",
    ),
    (
        "integers",
        "fused",
        add("experts.down_proj", E, H, I, dtype=torch.int8),
        {},
        "has dtype I8, expected one of F32, BF16, F16",
    ),
    ("float8", "fused", add("experts.down_proj", E, H, I, dtype=torch.float8_e4m3fn), {}, "has dtype F8_E4M3"),
    (
        "a dense layer",
        "gate up down",
        lambda t: (
            t.clear(),
            [add(f"{n}.weight", *s)(t) for n, s in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I)))],
        ),
        {},
        "no known layout of experts",
    ),
    (
        "another prefix",
        "gate up down",
        lambda t: None,
        {"prefix": "model.layers.4.mlp"},
        "no known layout of experts below 'model.layers.4.mlp.'; found: nothing",
    ),
    (
        "a prefix in the middle of a word",
        "gate up down",
        lambda t: None,
        {"prefix": "model.layers.3.ml"},
        "found: nothing",
    ),
    (
        "which experts",
        "gate up down",
        lambda t: None,
        {"config": dataclasses.replace(BASE, num_local_experts=2)},
        "num_local_experts=2 of num_experts=5: which",
    ),
    (
        "a quantised config",
        "gate up down",
        lambda t: None,
        {"config": dataclasses.replace(BASE, quant=QuantConfig("fp8_tensor"))},
        "is not quantised in this file",
    ),
    ("too few experts", "gate up down", lambda t: None, {"experts": [0, 1]}, "has 2 ids, expected 5"),
    (
        "an expert twice",
        "gate up down",
        lambda t: None,
        {"experts": [0, 1, 2, 3, 3]},
        "distinct ids from 0 to num_experts - 1 = 4",
    ),
    ("an expert out of range", "gate up down", lambda t: None, {"experts": [0, 1, 2, 3, 5]}, "distinct ids"),
    (
        "ids of another vocabulary",
        "ids by token",
        add("gate.tid2eid", 7, K + 1, dtype=torch.int64),
        {},
        "expected [vocabulary, 2]",
    ),
    *(
        (
            f"quantised {name}",
            "fused" if "{e}" not in name else "gate up down",
            add(name.replace("{e}", "2"), 1),
            {},
            f"{PREFIX}.{name.replace('{e}', '2')}: the layer is quantised",
        )
        for name in (
            "experts.{e}.up_proj.weight_scale",
            "experts.{e}.up_proj.weight_scale_inv",
            "experts.{e}.up_proj.weight_scale_2",
            "experts.{e}.up_proj.input_scale",
            "experts.{e}.up_proj.weight_packed",
            "experts.{e}.up_proj.qweight",
            "experts.{e}.up_proj.scale",
            "experts.gate_up_proj_blocks",
            "experts.gate_up_proj_scales",
            "experts.gate_up_proj_scale_inv",
            "experts.w13_weight_scale",
        )
    ),
]


@pytest.mark.parametrize(
    ("made_from", "change", "options", "text"), [case[1:] for case in WRONG], ids=[c[0] for c in WRONG]
)
def test_what_does_not_fit_is_an_error_that_names_it(
    made_from: str, change: Change, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    case, path = by_name(made_from), tmp_path / "model.safetensors"
    write(path, case)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    options = {"prefix": PREFIX, "config": case.config, **case.options, **options}
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, **options)
    assert text in str(caught.value)
    assert isinstance(caught.value, MoECoreError)


def test_a_bias_that_the_config_denies(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", by_name("fused, transposed, biases"))
    with pytest.raises(WeightsError, match="expert_bias=False"):
        load_weights(tmp_path, PREFIX, dataclasses.replace(BASE, expert_bias=False), interleaved=False)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=r"it holds pytorch_model\.bin; other formats are not read"):
        layer_prefixes(tmp_path)
    with pytest.raises(CheckpointError, match="there is nothing"):
        layer_prefixes(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        layer_prefixes(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"weight_map": []}', "AttributeError"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "'../other.safetensors'"),
        ('{"weight_map": {"a": "/other.safetensors"}}', "other.safetensors"),
        ('{"weight_map": {"a": "model.bin"}}', "'model.bin'"),
    ],
)
def test_an_index_that_cannot_be_followed(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        layer_prefixes(tmp_path)
    assert message in str(caught.value)


def test_a_missing_shard_and_a_wrong_one(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model-1-of-3.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1-of-3\.safetensors is missing"):
        load_weights(tmp_path, "model.layers.10.mlp", BASE)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-1-of-3.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.10\.mlp\.experts\.\w+ cannot be read"):
        load_weights(tmp_path, "model.layers.10.mlp", BASE)
    (tmp_path / "model-1-of-3.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        load_weights(tmp_path, "model.layers.10.mlp", BASE)


def test_what_a_layout_has_no_place_for_is_not_dropped(tmp_path: Path) -> None:
    case = by_name("shared gate")
    layout = Layout((Entry("w13_weight", ("w13",)), Entry("w2_weight", ("w2",)), Entry("gate_weight", ("gate",))))
    with pytest.raises(CheckpointError, match="no place for shared_w13_weight"):
        save_weights(random_weights(case.config), tmp_path / "x.safetensors", "", case.config, layout)
    with pytest.raises(CheckpointError, match="expected the name of a .safetensors file"):
        save_weights(random_weights(BASE), tmp_path / "x.bin", "", BASE, layout)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Entry("w14_weight", ("a",)), "w14_weight"),
        (lambda: Entry("w2_weight", ("a", "b")), "expected one name for w2_weight"),
        (lambda: Entry("w13_weight", ("{e}.a", "b")), "in every name or in none"),
        (lambda: Entry("gate_weight", ("gate.{e}",)), "only in those of w13_weight"),
        (lambda: Layout((Entry("w2_weight", ("a",)), Entry("w2_weight", ("b",)))), "more than one entry for w2_weight"),
    ],
)
def test_an_impossible_layout_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make()
    assert text in str(caught.value)
