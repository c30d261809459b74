"""Whole models of every architecture: the same logits and router logits after convert_model, and with register()."""

import models
import pytest
import torch
import zoo
from test_transformers_sweep import TOLERANCE

from moe_core.integrations.transformers import convert_model, register

MODULES = models.modules()


def router_logits(output):
    """Every tensor of router logits that a model recorded, of encoder and decoder."""
    found = []
    for name, value in output.items():
        if name.endswith("router_logits"):
            for entry in value:
                found += [t for t in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(t, torch.Tensor)]
    return found


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.split(".")[2])
def test_model(module, no_transformers_experts):
    model = models.build(module)
    inputs = models.inputs(model)
    names = set(model.state_dict())
    with torch.no_grad():
        wanted = models.first(model(**inputs))
        recorded = router_logits(models.build(module)(**inputs, output_router_logits=True))
        assert torch.isfinite(wanted).all()
        replaced = convert_model(model)
        assert not [m for m in model.modules() if isinstance(m, zoo.routed_experts_classes())]
        with no_transformers_experts(zoo.routed_experts_classes()):
            assert_close(models.first(model(**inputs)), wanted)
            again = model(**inputs, output_router_logits=True)
    assert replaced
    assert set(model.state_dict()) == names
    assert_close(models.first(again), wanted)
    assert_close(router_logits(again), recorded)
    assert recorded


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.split(".")[2])
def test_model_with_the_experts_implementation(module, no_transformers_experts):
    register()
    model = models.build(module)
    inputs = models.inputs(model)
    with torch.no_grad():
        wanted = models.first(model(**inputs))
        model.set_experts_implementation("moe_core")
        decorated = [m for m in model.modules() if hasattr(m, "_is_expert_parallel")]
        assert all(m.config._experts_implementation == "moe_core" for m in decorated)
        with no_transformers_experts([type(m) for m in decorated], dispatch=True):
            assert_close(models.first(model(**inputs)), wanted)
