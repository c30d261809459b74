"""The demo: a real trained model, before and after its MoE blocks became moe_core's.

The checkpoint, the held-out text and the n-gram counts are package data; MODEL_CARD.md beside them says how they were
made. transformers is imported inside the functions, because the rest of moe_core works without it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..report import SelectionReport
from ..runner import MoERunner
from .evaluate import bits_per_byte
from .ngram import KneserNeyTrigram

PROMPT = b"And it came to pass"
CONTINUATION_BYTES = 200
CONTEXT = 256
BATCH = 8


@dataclass
class DemoResult:
    """What the demo found; ``as_dict`` is its JSON."""

    backend: str
    report: SelectionReport
    replaced: list[str]
    bits_per_byte: dict[str, float]
    tokens_per_second: dict[str, float]
    expert_load: list[list[int]]
    continuation: str
    seconds: float = 0.0
    experts_implementation: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "backend": self.backend,
            "bits_per_byte": self.bits_per_byte,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "replaced": self.replaced,
            "expert_load": self.expert_load,
            "continuation": self.continuation,
            "report": self.report.as_dict(),
            "transformers_experts_implementation": self.experts_implementation,
        }


@contextmanager
def data_folder() -> Iterator[Path]:
    """The package data as a folder, also from a zipped installation."""
    with as_file(files("moe_core.demo") / "data") as folder:
        yield folder


def load_model(folder: Path) -> nn.Module:
    """The shipped checkpoint through transformers, in float32."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()  # type: ignore[no-any-return]


def expert_load(model: nn.Module, blocks: list[str], text: bytes) -> list[list[int]]:
    """Tokens per expert of each layer over ``text``, in the order of the layers."""
    with ExitStack() as stack:
        records = [stack.enter_context(_runner(model, name).recording()) for name in blocks]
        bits_per_byte(model, text, CONTEXT, BATCH)
    return [record.tokens_per_expert.tolist() for record in records]


def _runner(model: nn.Module, block: str) -> MoERunner:
    runner = model.get_submodule(block).runner
    assert isinstance(runner, MoERunner)
    return runner


def generate(model: nn.Module, prompt: bytes, count: int) -> str:
    """``count`` bytes after ``prompt``, sampled with a fixed seed."""
    torch.manual_seed(0)
    ids = torch.tensor([list(prompt)])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=True, temperature=0.7, pad_token_id=0
    )
    return bytes(out[0, len(prompt) :].tolist()).decode("latin-1")


@dataclass
class _Timed:
    model: nn.Module
    seconds: float = 0.0
    tokens: int = 0
    bits: list[float] = field(default_factory=list)


def run(advance: Callable[[str], None] = lambda step: None) -> DemoResult:
    """Everything the demo shows.

    Args:
        advance: called with the name of each step that begins; there are ``STEPS`` of them.
    """
    from ..integrations.transformers import convert_model

    start = time.perf_counter()
    with torch.no_grad(), data_folder() as folder:
        advance("loading")
        original = load_model(folder)
        text = (folder / "heldout.txt").read_bytes()
        ours = copy.deepcopy(original)
        replaced = convert_model(ours)
        advance("n-gram")
        ngram = KneserNeyTrigram.load(folder / "ngram3.safetensors").bits_per_byte(text)
        timed = {"transformers": _Timed(original), "moe_core": _Timed(ours)}
        pieces = _pieces(text)
        for entry in timed.values():  # warm-up: first calls bind and allocate
            bits_per_byte(entry.model, pieces[0][: CONTEXT * 2], CONTEXT, BATCH)
        for piece in pieces:  # in turns, so that the machine's moods hit both
            for name, entry in timed.items():
                advance(name)
                began = time.perf_counter()
                entry.bits.append(bits_per_byte(entry.model, piece, CONTEXT, BATCH) * len(piece))
                entry.seconds += time.perf_counter() - began
                entry.tokens += len(piece)
        advance("expert load")
        load = expert_load(ours, replaced, pieces[0])
        advance("generating")
        continuation = generate(ours, PROMPT, CONTINUATION_BYTES)
    report = _runner(ours, replaced[0]).report
    bits = {name: sum(entry.bits) / len(text) for name, entry in timed.items()}
    return DemoResult(
        backend=report.backend,
        report=report,
        replaced=replaced,
        bits_per_byte={"ngram3": ngram, **bits},
        tokens_per_second={name: entry.tokens / entry.seconds for name, entry in timed.items()},
        expert_load=load,
        continuation=continuation,
        seconds=time.perf_counter() - start,
        experts_implementation=str(getattr(original.config, "_experts_implementation", "eager")),
    )


PIECES = 4
STEPS = 4 + 2 * PIECES


def _pieces(text: bytes) -> list[bytes]:
    size = -(-len(text) // PIECES)
    return [text[i : i + size] for i in range(0, len(text), size)]
