"""Checkpoints that transformers itself writes: loaded without transformers, they give the outputs of its blocks.

transformers saves under the names of the published checkpoints, not those of its modules, so nothing here knows how a
layout looks: the config comes from the module, the tensors from the file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from test_transformers_sweep import TOLERANCE, arguments, tensors
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import moe_core.demo
from moe_core import MoERunner
from moe_core.checkpoints import CheckpointFiles, checkpoint_tensors, detect_layout, layer_prefixes, load_weights
from moe_core.integrations.transformers import convert_block
from moe_core.integrations.transformers.adapters import ADAPTERS
from moe_core.weights import resolve_config

MLA = {"num_attention_heads": 4, "num_key_value_heads": 4}
EVERY_LAYER = {"first_k_dense_replace": 0, "num_hidden_layers": 1}

# Model, what its config needs besides zoo's small sizes, and what load_weights has to be told: which tensors are those
# of modules that stay (latent projections, shared experts with an activation of their own), which order rows have.
MODELS: list[tuple[str, dict, dict]] = [
    ("AfmoeForCausalLM", {"num_dense_layers": 0}, {}),
    ("AriaTextForCausalLM", {}, {}),
    ("BailingHybridForCausalLM", {"pad_token_id": 0, "num_hidden_layers": 3}, {}),
    ("Cohere2MoeForCausalLM", {}, {}),
    ("DeepseekV2ForCausalLM", {**MLA, **EVERY_LAYER}, {}),
    ("DeepseekV3ForCausalLM", {**MLA, **EVERY_LAYER}, {}),
    ("DeepseekV4ForCausalLM", {}, {}),
    ("Dots1ForCausalLM", EVERY_LAYER, {}),
    ("Ernie4_5_MoeForCausalLM", {}, {}),
    ("ExaoneMoeForCausalLM", {}, {}),
    ("FlexOlmoForCausalLM", {"pad_token_id": 0}, {}),
    ("Glm4MoeForCausalLM", {**MLA, **EVERY_LAYER}, {}),
    ("GptOssForCausalLM", {}, {}),
    ("GraniteMoeForCausalLM", {}, {}),
    ("GraniteMoeSWAForCausalLM", {}, {}),
    ("GraniteMoeSharedForCausalLM", {}, {}),
    ("HYV3ForCausalLM", {}, {}),
    ("HYV4ForCausalLM", {"pad_token_id": 0}, {"ignore": ["shared_experts.*"]}),
    ("HunYuanMoEV1ForCausalLM", {**MLA, "head_dim": 8}, {}),
    ("Inkling2ForCausalLM", {}, {"interleaved": True}),
    ("JambaForCausalLM", {}, {}),
    ("KimiLinearForCausalLM", {"pad_token_id": 0}, {}),
    ("Kolibri1ForCausalLM", {}, {}),
    ("LagunaForCausalLM", {}, {}),
    ("Lfm2MoeForCausalLM", {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0}, {}),
    ("Llama4ForCausalLM", {"num_experts_per_tok": 1}, {}),
    ("LongcatFlashForCausalLM", {"num_hidden_layers": 1, **MLA}, {}),
    ("MellumForCausalLM", {}, {}),
    ("MiniMaxForCausalLM", {}, {}),
    ("MiniMaxM2ForCausalLM", {}, {}),
    ("MiniMaxM3VLForCausalLM", {}, {}),
    ("Mistral4ForCausalLM", MLA, {}),
    ("MixtralForCausalLM", {}, {}),
    ("NemotronHForCausalLM", {}, {"ignore": ["fc1_latent_proj.weight", "fc2_latent_proj.weight"]}),
    ("OlmoeForCausalLM", {}, {}),
    ("PhimoeForCausalLM", {}, {}),
    ("Qwen2MoeForCausalLM", {}, {}),
    ("Qwen3MoeForCausalLM", {}, {}),
    ("Qwen3NextForCausalLM", {}, {}),
    ("Qwen3VLMoeTextModel", {}, {}),
    ("Qwen3_5MoeForCausalLM", {}, {}),
    ("SolarOpenForCausalLM", {}, {}),
]


def small(name: str, overrides: dict) -> torch.nn.Module:
    """A small random model, run eagerly."""
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"the installed transformers has no {name}")
    config = zoo.small_config(cls.config_class, **overrides)
    config._experts_implementation = "eager"
    model = cls(config).eval()
    zoo._randomize(model)
    return model


@pytest.mark.parametrize(("name", "overrides", "options"), MODELS, ids=[model[0] for model in MODELS])
def test_a_saved_model_loads_and_gives_its_blocks_outputs(
    name: str, overrides: dict, options: dict, tmp_path: Path
) -> None:
    logging.disable_progress_bar()
    model = small(name, overrides)
    blocks = [module for module in model.modules() if type(module).__name__ in ADAPTERS]
    model.save_pretrained(tmp_path)
    prefixes = layer_prefixes(tmp_path)
    assert len(prefixes) == len(blocks) > 0
    for prefix, block in zip(prefixes, blocks, strict=True):
        converted = convert_block(block)
        config = resolve_config(converted.config, converted.weights())
        weights = load_weights(tmp_path, prefix, config, **options)
        runner = MoERunner(config, weights, **converted.runner_options())
        x, *ids = arguments(block)
        with torch.no_grad():
            wanted = tensors(block(x.clone(), *ids))[0]
            got = runner(x, input_ids=ids[0] if ids else None)
        torch.testing.assert_close(got.view_as(wanted), wanted, atol=TOLERANCE, rtol=0)
        with CheckpointFiles(tmp_path) as files:
            saved = checkpoint_tensors(weights, prefix, config, detect_layout(files, prefix, config, **options))
            assert saved.keys() <= set(files)
            assert all(torch.equal(tensor, files.read(tensor_name)) for tensor_name, tensor in saved.items())


def test_two_ranks_load_half_the_experts_each(tmp_path: Path) -> None:
    """The sum of the routed outputs of both is the block's, whose experts lie fused, transposed and interleaved."""
    logging.disable_progress_bar()
    model = small("GptOssForCausalLM", {})
    model.save_pretrained(tmp_path)
    (prefix, *_), block = layer_prefixes(tmp_path), model.model.layers[0].mlp
    converted = convert_block(block)
    config = dataclasses.replace(converted.config, num_local_experts=zoo.E // 2)
    x = arguments(block)[0].view(-1, zoo.H)
    total = torch.zeros_like(x)
    with torch.no_grad():
        *_, routing_weights, ids = block.router(x)
        for rank in range(2):
            local = range(rank * zoo.E // 2, (rank + 1) * zoo.E // 2)
            weights = load_weights(tmp_path, prefix, config, experts=local)
            inside = (ids >= local.start) & (ids < local.stop)
            total += MoERunner(config, weights)(
                x, topk_weights=routing_weights, topk_ids=torch.where(inside, ids - local.start, -1)
            )
        torch.testing.assert_close(total, block(x[None])[0].view_as(total), atol=TOLERANCE, rtol=0)


def test_the_shipped_model_loads() -> None:
    """All layers of the demo's checkpoint, as published, in bfloat16."""
    folder = Path(moe_core.demo.__file__).parent / "data"
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    prefixes = layer_prefixes(folder)
    assert prefixes == [f"model.layers.{i}.mlp" for i in range(7)]
    for i, prefix in enumerate(prefixes):
        block = model.model.layers[i].mlp
        config = convert_block(block).config
        runner = MoERunner(config, load_weights(folder, prefix, config), backend="reference")
        x = torch.randn(9, config.hidden_size).bfloat16()
        with torch.no_grad():
            wanted = block(x[None])[0].float()
            error = (runner(x).float() - wanted).norm() / wanted.norm()
        assert error < 1e-2, (prefix, float(error))
