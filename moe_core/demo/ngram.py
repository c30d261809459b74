"""An interpolated modified Kneser-Ney model of three bytes: the baseline that the demo's checkpoint has to beat.

With ``c(uvw)`` the count of byte ``w`` after the two bytes ``uv``, and a dot for "any byte",

    p3(w|uv) = (c(uvw) - D3(c(uvw))) / c(uv.) + g3(uv) p2(w|v)
    p2(w|v)  = (N(.vw) - D2(N(.vw))) / N(.v.) + g2(v)  p1(w)
    p1(w)    = (N(.w)  - D1(N(.w)))  / N(..)  + g1     1/256

``N(.vw)`` is the number of distinct bytes seen before ``vw`` and ``N(.w)`` the number of distinct ``v`` with
``N(.vw) > 0`` (continuation counts). ``Dn`` takes three values, for counts 1, 2 and 3 or more. ``g`` is the mass that
the discounts of that context freed, so every distribution sums to one; an unseen context passes on to the shorter one;
the uniform base gives every byte a probability above zero.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, TR-10-98 (1998),
equations 24 to 27; Kneser and Ney, Improved backing-off for m-gram language modeling, ICASSP 1995.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PREFIX = b"\n\n"
"""The two bytes taken to stand before every text, so that its first byte has a context."""

_FORMAT = "moe_core.demo.ngram3/1"


class KneserNeyTrigram:
    """A trigram model over bytes: ``KneserNeyTrigram().fit(data).bits_per_byte(text)``.

    Only the counts of seen trigrams are state (and what :meth:`save` writes); the rest is recomputed from them.
    """

    def __init__(self) -> None:
        self._set_counts(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def fit(self, data: bytes) -> KneserNeyTrigram:
        """Count the trigrams of `data` (replacing what was counted before) and return self."""
        self._set_counts(*torch.unique(_trigrams(data), return_counts=True))
        return self

    def bits_per_byte(self, data: bytes) -> float:
        """The mean of ``-log2 p(byte | two bytes before)`` over every byte of `data`, the first after :data:`PREFIX`.

        Raises:
            ValueError: `data` is empty.
        """
        if not data:
            raise ValueError("bits_per_byte needs at least one byte, got none")
        return float(-self._trigram_probability(_trigrams(data)).log2().mean())

    def probabilities(self, context: bytes) -> Tensor:
        """[256] float64: the distribution of the byte after `context`, which is two bytes long.

        Raises:
            ValueError: `context` is not two bytes.
        """
        if len(context) != 2:
            raise ValueError(f"context must be two bytes, got {len(context)}")
        return self._trigram_probability((context[0] << 16 | context[1] << 8) + torch.arange(256))

    def save(self, path: str | Path) -> None:
        """Write the counts to a safetensors file."""
        counts = {"keys": self._keys.to(torch.int32), "counts": self._counts.to(torch.int32)}
        save_file(counts, path, metadata={"format": _FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> KneserNeyTrigram:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != _FORMAT:
                raise ValueError(f"{path} has format {found!r}, expected {_FORMAT!r}")
            model = cls()
            model._set_counts(file.get_tensor("keys").long(), file.get_tensor("counts").long())
        return model

    def _set_counts(self, keys: Tensor, counts: Tensor) -> None:
        """Take sorted distinct trigrams ``u << 16 | v << 8 | w`` and their counts; derive all shorter tables."""
        self._keys, self._counts = keys, counts
        bigram_before = torch.bincount(keys & 0xFFFF, minlength=1 << 16)  # N(.vw), by v << 8 | w
        unigram_before = (bigram_before.view(256, 256) > 0).sum(0)  # N(.w)

        kept, freed = _discount(unigram_before.view(1, 256))
        p1 = kept + freed[:, None] / 256
        kept, freed = _discount(bigram_before.view(256, 256))
        self._p2 = (kept + freed[:, None] * p1).flatten()  # by v << 8 | w

        discounted = counts - _discounts_of(counts)[counts.clamp(max=3)]
        context = keys >> 8
        totals = torch.zeros(1 << 16, dtype=torch.float64).index_add_(0, context, counts.double())
        kept3 = discounted / totals[context]
        self._freed3 = 1 - torch.zeros(1 << 16, dtype=torch.float64).index_add_(0, context, kept3)
        # A last entry no trigram can match lets a search past the end find a non-match instead of an index error.
        self._search_keys = torch.cat([keys, torch.tensor([1 << 24])])
        self._kept3 = torch.cat([kept3, torch.zeros(1, dtype=torch.float64)])

    def _trigram_probability(self, keys: Tensor) -> Tensor:
        """[N] float64 ``p3`` of [N] int64 trigrams."""
        at = torch.searchsorted(self._search_keys, keys)
        kept = torch.where(self._search_keys[at] == keys, self._kept3[at], 0.0)
        return kept + self._freed3[keys >> 8] * self._p2[keys & 0xFFFF]


def _trigrams(data: bytes) -> Tensor:
    """[len(data)] int64: each byte with the two before it, as ``u << 16 | v << 8 | w``."""
    ids = torch.frombuffer(bytearray(PREFIX + data), dtype=torch.uint8).long()
    return ids[:-2] << 16 | ids[1:-1] << 8 | ids[2:]


def _discount(counts: Tensor) -> tuple[Tensor, Tensor]:
    """[C, 256] counts to the discounted shares [C, 256] and each row's freed mass [C] (1 where nothing was seen)."""
    kept = (counts - _discounts_of(counts)[counts.clamp(max=3)]) / counts.sum(1, keepdim=True).clamp(min=1)
    return kept, 1 - kept.sum(1)


def _discounts_of(counts: Tensor) -> Tensor:
    """[4] float64: how much to take from a count of 0, 1, 2 and 3 or more, by the counts of counts.

    ``Y = n1 / (n1 + 2 n2)`` and ``Di = i - (i + 1) Y n(i+1) / ni``; 0.5 each where a tiny text leaves one of n1 to n4
    empty or a discount outside (0, i], where the estimate means nothing.
    """
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < discount <= i for i, discount in enumerate(discounts, 1)):
            return torch.tensor([0.0, *discounts], dtype=torch.float64)
    return torch.tensor([0.0, 0.5, 0.5, 0.5], dtype=torch.float64)
