"""The demo's n-gram baseline and the windows of its evaluation."""

from types import SimpleNamespace

import pytest
import torch

from moe_core.demo.evaluate import bits_per_byte
from moe_core.demo.ngram import KneserNeyTrigram

TEXT = b"In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void; " * 3


def test_every_distribution_sums_to_one_and_leaves_no_byte_out():
    model = KneserNeyTrigram().fit(TEXT)
    seen = {TEXT[i : i + 2] for i in range(len(TEXT) - 1)}
    for context in seen | {b"zz", b"\x00\xff", b"e\x00", b"\x00e"}:
        distribution = model.probabilities(context)
        assert distribution.shape == (256,)
        assert float(distribution.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(distribution.min()) > 0


def test_estimated_discounts_also_give_a_distribution():
    generator = torch.Generator().manual_seed(0)
    skewed = torch.rand(20_000, generator=generator).pow(3) * 40 + 65
    model = KneserNeyTrigram().fit(bytes(skewed.to(torch.uint8).tolist()))
    for context in (b"AA", b"Ah", b"hh", b"zz"):
        assert float(model.probabilities(context).sum()) == pytest.approx(1.0, abs=1e-12)


def test_hand_computed():
    # After "\n\n", "aab" has the trigrams \n\na, \naa and aab, once each; no count of 2 exists, so each D is 0.5.
    # N(.w): a is seen after \n and a, b after a: p1(a) = 1.5/3 + 1/3/256, p1(b) = 0.5/3 + 1/3/256.
    # N(.vw): aa once, ab once: p2(b|a) = 0.5/2 + 1/2 p1(b).   p3(b|aa) = 0.5/1 + 0.5 p2(b|a).
    model = KneserNeyTrigram().fit(b"aab")
    freed1 = 1 / 3 / 256
    p1_a, p1_b = 1.5 / 3 + freed1, 0.5 / 3 + freed1
    p2_a, p2_b = 0.25 + 0.5 * p1_a, 0.25 + 0.5 * p1_b
    assert float(model.probabilities(b"aa")[ord("b")]) == pytest.approx(0.5 + 0.5 * p2_b, abs=1e-12)
    assert float(model.probabilities(b"xa")[ord("a")]) == pytest.approx(p2_a, abs=1e-12)  # unseen: order 2
    assert float(model.probabilities(b"ax")[ord("b")]) == pytest.approx(p1_b, abs=1e-12)  # unseen: order 1
    assert float(model.probabilities(b"xy")[ord("z")]) == pytest.approx(freed1, abs=1e-12)  # never seen: base


def test_bits_per_byte_is_the_mean_over_all_bytes():
    model = KneserNeyTrigram().fit(TEXT)
    text = b"the void\xff"
    padded = b"\n\n" + text
    bits = [-model.probabilities(padded[i : i + 2])[padded[i + 2]].log2() for i in range(len(text))]
    assert model.bits_per_byte(text) == pytest.approx(float(torch.stack(bits).mean()), abs=1e-12)
    assert model.bits_per_byte(TEXT) < 2 < KneserNeyTrigram().bits_per_byte(TEXT) == 8.0


def test_save_and_load(tmp_path):
    model = KneserNeyTrigram().fit(TEXT)
    model.save(tmp_path / "ngram3.safetensors")
    loaded = KneserNeyTrigram.load(tmp_path / "ngram3.safetensors")
    assert loaded.bits_per_byte(TEXT) == model.bits_per_byte(TEXT)
    assert torch.equal(loaded.probabilities(b"th"), model.probabilities(b"th"))


def test_load_refuses_another_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"keys": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected 'moe_core.demo.ngram3/1'"):
        KneserNeyTrigram.load(tmp_path / "other.safetensors")


def test_bad_arguments():
    with pytest.raises(ValueError, match="two bytes, got 3"):
        KneserNeyTrigram().probabilities(b"abc")
    with pytest.raises(ValueError, match="at least one byte"):
        KneserNeyTrigram().bits_per_byte(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(None, b"", context=8, batch=1)


class BigramModel(torch.nn.Module):
    """Logits that depend on the input byte alone, so that windows must not change the result."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100, 291])  # shorter than, equal to and no multiple of a window
@pytest.mark.parametrize("batch", [1, 5])
def test_evaluation_scores_every_byte_once(size, batch):
    model = BigramModel()
    ids = torch.tensor(list(b"\n" + TEXT[:size]))
    log2 = model.table.detach().double().log_softmax(-1)[ids[:-1], ids[1:]] / torch.tensor(2.0).log()
    assert bits_per_byte(model, TEXT[:size], context=8, batch=batch) == pytest.approx(-float(log2.mean()), rel=1e-5)
