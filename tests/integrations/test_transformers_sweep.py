"""Every MoE architecture of the installed transformers: equal outputs, with transformers' own experts made to raise."""

import pytest
import torch
import zoo

from moe_core.integrations.transformers import convert_block, register

TOLERANCE = 2e-5
BLOCKS = zoo.block_classes()
EXPERTS = zoo.experts_classes()
# Without any of these the sweep would say little; D is what the installed transformers has.
FEWEST = 60


def arguments(block, tokens=(2, 5)):
    x = torch.randn(*tokens, zoo.H, generator=torch.Generator().manual_seed(1))
    if hasattr(getattr(block, "gate", None), "tid2eid") or type(block).__name__.startswith("DeepseekV4"):
        return (x, torch.arange(tokens[0] * tokens[1]).reshape(tokens) % 64)
    return (x,)


def tensors(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]


def assert_equal_results(wanted, got):
    wanted, got = tensors(wanted), tensors(got)
    assert [(t.shape, t.dtype) for t in wanted] == [(t.shape, t.dtype) for t in got]
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("found", BLOCKS, ids=str)
def test_block(found, no_transformers_experts):
    block = zoo.build(found)
    shapes = ((2, 5), (1, 1), (3, 0))
    with torch.no_grad():
        wanted = [block(*arguments(block, shape)) for shape in shapes]
        converted = convert_block(block)
        assert not [m for m in converted.modules() if isinstance(m, zoo.all_experts_classes())]
        with no_transformers_experts():
            got = [converted(*arguments(block, shape)) for shape in shapes]
    for eager, ours in zip(wanted, got, strict=True):
        assert_equal_results(eager, ours)
    before, after = block.state_dict(), converted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    converted.load_state_dict({name: value.clone() for name, value in before.items()})


@pytest.mark.parametrize("found", EXPERTS, ids=str)
def test_experts(found, no_transformers_experts):
    register()
    experts = zoo.build(found)
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, hidden, generator=generator)
    ids = torch.stack([torch.randperm(experts.num_experts, generator=generator)[: zoo.K] for _ in range(7)])
    weights = torch.rand(7, zoo.K, generator=generator)
    with torch.no_grad():
        wanted = experts(x, ids, weights)
        experts.config._experts_implementation = "moe_core"
        with no_transformers_experts(dispatch=True):
            got = experts(x, ids, weights)
        alone = convert_block(experts)
        with no_transformers_experts():
            alone = alone(x, ids, weights)
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(alone, wanted, atol=TOLERANCE, rtol=0)


def test_the_sweep_covers_what_it_says(capsys):
    """Prints N of D: how many classes could be built and are compared above, of those that transformers has."""
    built = dict.fromkeys(("experts", "blocks"), 0)
    for kind, classes in (("experts", EXPERTS), ("blocks", BLOCKS)):
        for found in classes:
            zoo.build(found)
            built[kind] += 1
    with capsys.disabled():
        for kind, classes in (("experts", EXPERTS), ("blocks", BLOCKS)):
            print(f"\ntransformers sweep: {built[kind]} of {len(classes)} {kind}")  # noqa: T201
    assert built["experts"] == len(EXPERTS) >= FEWEST
    assert built["blocks"] == len(BLOCKS) >= FEWEST
