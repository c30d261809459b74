"""Checkpoints: every layout loads into the same weights, local experts alone are read, and saves to the same file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    BASE,
    BESIDE,
    CASES,
    CORRECTED,
    PREFIX,
    SHARED,
    Case,
    H,
    Tensors,
    assert_equal_weights,
    by_name,
    random_weights,
    shards,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_core import MoERunner, MoEWeights
from moe_core.checkpoints import (
    CheckpointFiles,
    Entry,
    Layout,
    checkpoint_tensors,
    detect_layout,
    files,
    layer_prefixes,
    load_weights,
    save_weights,
)
from moe_core.errors import CheckpointError


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_loads_and_saves_back_to_the_same_file(case: Case, tmp_path: Path) -> None:
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    wanted = write(path, case)
    found = load_weights(path, PREFIX, case.config, **case.options)
    assert_equal_weights(found, wanted)
    with CheckpointFiles(tmp_path) as tensors:
        layout = detect_layout(tensors, PREFIX, case.config, **case.options)
    save_weights(found, copy, PREFIX, case.config, layout)
    original, again = load_file(path), load_file(copy)
    assert again.keys() == original.keys() - {"model.embed_tokens.weight", "model.layers.3.input_layernorm.weight"}
    for name, tensor in again.items():
        assert tensor.shape == original[name].shape, name
        assert torch.equal(tensor, original[name]), name
    assert_equal_weights(load_weights(copy, PREFIX, case.config, **case.options), wanted)
    assert layer_prefixes(path) == [PREFIX]


class Recorder:
    """Stands for safe_open: notes which files are opened, and how many bytes of which tensors are read from them."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.read: list[tuple[str, int]] = []

    def __call__(self, file: Path, framework: str) -> Any:
        self.opened.append(Path(file).name)
        return _Recorded(safe_open(file, framework=framework), self)

    def note(self, name: str, tensor: Tensor) -> Tensor:
        self.read.append((name, tensor.nbytes))
        return tensor


class _Recorded:
    def __init__(self, real: Any, log: Recorder) -> None:
        self.real, self.log = real, log

    def __enter__(self) -> _Recorded:
        self.handle = self.real.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.real.__exit__(*error)

    def keys(self) -> Any:
        return self.handle.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.log.note(name, self.handle.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        return _RecordedSlice(self.handle.get_slice(name), name, self.log)


class _RecordedSlice:
    def __init__(self, real: Any, name: str, log: Recorder) -> None:
        self.real, self.name, self.log = real, name, log

    def get_shape(self) -> Any:
        return self.real.get_shape()

    def get_dtype(self) -> Any:
        return self.real.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        return self.log.note(self.name, self.real[rows])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(files, "safe_open", recorder)
    return recorder


EXPERT_FIELDS = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")


@pytest.mark.parametrize("ids", [range(1, 3), [4, 0, 1], [3], range(0)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_experts_alone_are_read(case: Case, ids: Any, tmp_path: Path, recorder: Recorder) -> None:
    """Foreign experts' tensors are not opened, and of stacked ones no foreign byte is read."""
    path = tmp_path / "model.safetensors"
    wanted = write(path, case)
    config = dataclasses.replace(case.config, num_local_experts=len(ids))
    found = load_weights(path, PREFIX, config, experts=ids, **case.options)
    local = {name: tensor[list(ids)] if name in EXPERT_FIELDS else tensor for name, tensor in wanted.named_tensors()}
    assert_equal_weights(found, MoEWeights(**local))
    for name, _ in recorder.read:
        expert = name.removeprefix(f"{PREFIX}.experts.").removeprefix("expert_").partition(".")[0]
        assert not expert.isdigit() or int(expert) in ids, name
    assert sum(size for _, size in recorder.read) == sum(tensor.nbytes for _, tensor in found.named_tensors())


@pytest.mark.parametrize("name", ["gate up down", "w1 w3 w2"])
def test_local_experts_save_back_under_their_global_names(name: str, tmp_path: Path) -> None:
    case, path = by_name(name), tmp_path / "model.safetensors"
    write(path, case)
    config = dataclasses.replace(case.config, num_local_experts=2)
    found = load_weights(path, PREFIX, config, experts=[4, 1])
    with CheckpointFiles(path) as tensors:
        layout = detect_layout(tensors, PREFIX)
    saved = checkpoint_tensors(found, PREFIX, config, layout, experts=[4, 1])
    original = load_file(path)
    assert {n.split(".")[5] for n in saved if ".experts." in n} == {"1", "4"}
    assert all(torch.equal(tensor, original[n]) for n, tensor in saved.items())
    with pytest.raises(CheckpointError, match="num_local_experts=2 of num_experts=5: which"):
        checkpoint_tensors(found, PREFIX, config, layout)


def test_stacked_experts_are_saved_all_or_not_at_all(tmp_path: Path) -> None:
    case, path = by_name("fused"), tmp_path / "model.safetensors"
    write(path, case)
    config = dataclasses.replace(case.config, num_local_experts=2)
    found = load_weights(path, PREFIX, config, experts=range(2))
    with (
        CheckpointFiles(path) as tensors,
        pytest.raises(CheckpointError, match="all 5 experts, and the weights hold 2"),
    ):
        save_weights(
            found, tmp_path / "x.safetensors", PREFIX, config, detect_layout(tensors, PREFIX), experts=range(2)
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_of_a_folder_only_the_needed_shards_are_opened(tmp_path: Path, recorder: Recorder) -> None:
    wanted = shards(tmp_path)
    assert_equal_weights(load_weights(tmp_path, "model.layers.10.mlp.", BASE), wanted["model.layers.10.mlp"])
    assert recorder.opened == ["model-1-of-3.safetensors"]
    assert layer_prefixes(tmp_path) == ["model.layers.0.mlp", "model.layers.10.mlp", "model.layers.20.mlp"]


def test_a_layer_may_be_split_between_shards(tmp_path: Path) -> None:
    wanted = write(tmp_path / "all.safetensors", by_name("gate up down"))
    tensors = load_file(tmp_path / "all.safetensors")
    index = {}
    for i, name in enumerate(sorted(tensors)):
        save_file({name: tensors[name]}, tmp_path / f"{i}.safetensors")
        index[name] = f"{i}.safetensors"
    (tmp_path / "all.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_equal_weights(load_weights(tmp_path, PREFIX, BASE), wanted)


def test_nothing_is_copied_where_the_layout_allows(tmp_path: Path) -> None:
    """What a load hands out for stacked tensors is what safetensors handed out, local experts and views included."""
    path = tmp_path / "model.safetensors"
    write(path, by_name("fused, transposed"))
    config = dataclasses.replace(SHARED, num_local_experts=2)
    handed_out: list[int] = []
    original = CheckpointFiles.read_rows

    def spy(self: CheckpointFiles, name: str, start: int, stop: int) -> Tensor:
        tensor = original(self, name, start, stop)
        handed_out.append(tensor.data_ptr())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFiles, "read_rows", spy)
        found = load_weights(path, PREFIX, config, experts=range(1, 3))
    assert [found.w13_weight.data_ptr(), found.w2_weight.data_ptr()] == handed_out


def test_dtype_and_device(tmp_path: Path) -> None:
    wanted = write(tmp_path / "model.safetensors", by_name("bias gate.e_score_correction_bias"))
    half = load_weights(tmp_path, PREFIX, CORRECTED, dtype=torch.bfloat16)
    assert half.w13_weight.dtype == half.gate_weight.dtype == torch.bfloat16
    assert torch.equal(half.e_score_correction_bias, wanted.e_score_correction_bias)
    assert torch.equal(half.w2_weight, wanted.w2_weight.bfloat16())
    meta = load_weights(tmp_path, PREFIX, CORRECTED, device="meta")
    assert {tensor.device.type for _, tensor in meta.named_tensors()} == {"meta"}


def test_a_rounded_correction_bias_becomes_float32(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, by_name("bias expert_bias"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    found = load_weights(path, PREFIX, CORRECTED)
    assert found.w13_weight.dtype == torch.bfloat16
    assert found.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(found.e_score_correction_bias, tensors[f"{PREFIX}.expert_bias"].float())


def test_a_file_is_replaced_under_its_own_weights(tmp_path: Path) -> None:
    """Weights may be maps of the file: saving over it must not pull it from under them."""
    path = tmp_path / "model.safetensors"
    wanted = write(path, by_name("fused"))
    found = load_weights(path, PREFIX, BASE)
    with CheckpointFiles(path) as tensors:
        layout = detect_layout(tensors, PREFIX)
    found.w2_weight.mul_(2)
    save_weights(found, path, PREFIX, BASE, layout)
    assert torch.equal(found.w13_weight, wanted.w13_weight)
    assert torch.equal(load_weights(path, PREFIX, BASE).w2_weight, 2 * wanted.w2_weight)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_layers_in_one_file(tmp_path: Path) -> None:
    wanted = shards(tmp_path)
    tensors: Tensors = {}
    with CheckpointFiles(tmp_path) as checkpoint:
        for prefix in ("model.layers.0.mlp", "model.layers.10.mlp"):
            tensors |= checkpoint_tensors(wanted[prefix], prefix, BASE, detect_layout(checkpoint, prefix))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "two.safetensors")
    for prefix in ("model.layers.0.mlp", "model.layers.10.mlp"):
        assert_equal_weights(load_weights(tmp_path / "two.safetensors", prefix, BASE), wanted[prefix])


def test_a_loaded_layer_runs(tmp_path: Path) -> None:
    """Views and maps serve as weights: a transposed checkpoint gives the outputs of the weights it was made from."""
    case = by_name("fused, transposed")
    wanted = write(tmp_path / "model.safetensors", case)
    x = torch.randn(4, H)
    with torch.no_grad():
        found = MoERunner(case.config, load_weights(tmp_path, PREFIX, case.config))(x)
        torch.testing.assert_close(found, MoERunner(case.config, wanted)(x))


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    path = tmp_path / "model.safetensors"
    save_file({"ffn.up": weights.w13_weight.clone(), "ffn.down": weights.w2_weight.clone()}, path)
    weights.gate_weight = None
    layout = Layout((Entry("w13_weight", ("up",)), Entry("w2_weight", ("down",))))
    assert_equal_weights(load_weights(path, "ffn", BASE, layout=layout), weights)
    with pytest.raises(CheckpointError, match="unexpected tensors below 'ffn.': down"):
        load_weights(path, "ffn", BASE, layout=Layout((Entry("w13_weight", ("up",)),)))


def test_what_is_ignored_may_be_there(tmp_path: Path) -> None:
    """A decoder layer that holds the experts itself: the prefix is the layer's, attention and norms are ignored."""
    path = tmp_path / "model.safetensors"
    wanted = write(path, by_name("gate up down"), "layers.0")
    tensors = load_file(path)
    save_file(
        {**tensors, "layers.0.attention.wq.weight": torch.zeros(2, 2), "layers.0.ffn_norm.weight": torch.zeros(2)}, path
    )
    with pytest.raises(CheckpointError, match="attention.wq.weight, ffn_norm.weight"):
        load_weights(path, "layers.0", BASE)
    assert_equal_weights(load_weights(path, "layers.0", BASE, ignore=["attention.*", "*_norm.weight"]), wanted)


def test_shared_experts_beside_the_layer_may_stay_outside(tmp_path: Path) -> None:
    wanted = write(tmp_path / "model.safetensors", BESIDE)
    found = load_weights(tmp_path, PREFIX, BASE)
    assert found.shared_w13_weight is None
    assert torch.equal(found.w13_weight, wanted.w13_weight)


def test_the_whole_file_may_be_the_layer(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    save_file(dict(weights.named_tensors()), tmp_path / "model.safetensors")
    assert_equal_weights(load_weights(tmp_path, "", BASE), weights)
    assert layer_prefixes(tmp_path) == [""]
