"""The demo's trained model: the same bits per byte with transformers' experts, register() and convert_model."""

import copy

import pytest
import torch

from moe_core.demo.evaluate import bits_per_byte
from moe_core.demo.run import BATCH, CONTEXT, data_folder, load_model
from moe_core.integrations.transformers import convert_model, register

BYTES = 3000


def test_bits_per_byte_do_not_depend_on_who_runs_the_experts(no_transformers_experts):
    register()
    with data_folder() as folder:
        theirs = load_model(folder)
        text = (folder / "heldout.txt").read_bytes()[:BYTES]
    registered, converted = copy.deepcopy(theirs), copy.deepcopy(theirs)
    registered.set_experts_implementation("moe_core")
    replaced = convert_model(converted)
    assert len(replaced) == theirs.config.num_hidden_layers
    wanted = bits_per_byte(theirs, text, CONTEXT, BATCH)
    with no_transformers_experts(dispatch=True):
        with_register = bits_per_byte(registered, text, CONTEXT, BATCH)
    with no_transformers_experts():
        with_convert = bits_per_byte(converted, text, CONTEXT, BATCH)
    # Untrained, a byte costs 8 bits; a wrong expert or weight anywhere moves the third digit.
    assert wanted < 3
    assert with_register == pytest.approx(with_convert, abs=1e-6)
    assert with_register == pytest.approx(wanted, abs=1e-6)
    assert all(p.dtype == torch.float32 for p in converted.parameters())
