"""Train the checkpoint that moe_core's demo ships: a byte-level Qwen2-MoE on the King James Bible.

Reads the plain text (README.md says how to get it), splits it, counts the n-gram baseline, trains by a wall-clock
budget, keeps the best weights by validation and writes the package data and a log of every measured figure.

    python examples/train_demo/train.py kjv.txt --out out --minutes 8 --compile
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, where moe_core is not installed
from moe_core.demo.evaluate import bits_per_byte
from moe_core.demo.ngram import KneserNeyTrigram

VALIDATION = ("Heb", "Jas")  # chooses the step and the settings; never trained on
HELDOUT = ("Rev",)  # the whole last book: measured at the end, chooses nothing
DEMO_BYTES = 50 * 1000  # at most so much of its beginning ships with the demo, to the end of a chapter

VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)")
CONTEXT = 512
DEMO_CONTEXT = 256  # what the demo evaluates with, to be quick on a CPU


def split(text: str) -> dict[str, bytes]:
    """The train, validation and heldout bytes: one verse a line, an empty line between chapters, no references.

    demo is the beginning of heldout that the package ships.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    chapter = None
    for line in text.splitlines():
        match = VERSE.fullmatch(line)
        if match is None:
            raise SystemExit(f"not a verse such as 'Ge1:1 In the ...': {line!r}")
        book = match[1]
        lines = parts["validation" if book in VALIDATION else "heldout" if book in HELDOUT else "train"]
        if (book, match[2]) != chapter and lines:
            lines.append("")
        chapter = (book, match[2])
        lines.append(match[3].strip())
    split_bytes = {name: ("\n".join(lines) + "\n").encode() for name, lines in parts.items()}
    heldout = split_bytes["heldout"]
    return split_bytes | {"demo": heldout[: heldout.rindex(b"\n\n", 0, DEMO_BYTES) + 1]}


def dense_experts(self: Qwen2MoeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Qwen2MoeExperts.forward with every expert on every token, weighted by zero where not chosen.

    The same function as transformers' loop, as two large products without a host synchronisation: at this size a GPU
    is faster so, and torch.compile sees static shapes.
    """
    weights_TE = hidden_states.new_zeros(len(hidden_states), self.num_experts, dtype=top_k_weights.dtype)
    weights_TE = weights_TE.scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
    gate, up = gate_up.chunk(2, dim=-1)
    activated = self.act_fn(gate) * up * weights_TE[..., None]
    return F.linear(activated.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


def record_balance(gate: torch.nn.Module, inputs: tuple, output: tuple) -> None:
    """Forward hook of a router: its load-balancing loss, 1 where even (Switch Transformer, arXiv 2101.03961, eq. 4)."""
    logits, _, top_k_index = output
    share = F.one_hot(top_k_index, gate.num_experts).float().sum(1).mean(0) / gate.top_k
    gate.balance = gate.num_experts * (share * logits.float().softmax(-1).mean(0)).sum()


def make_model(args: argparse.Namespace, device: torch.device) -> Qwen2MoeForCausalLM:
    """A fresh model with dropout on the embedding and on each residual branch, which the architecture itself lacks."""
    config = Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        intermediate_size=args.shared,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=args.shared,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        attention_dropout=args.dropout,
    )
    model = Qwen2MoeForCausalLM(config).to(device)

    def drop(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return F.dropout(output[0], args.dropout, module.training), *output[1:]
        return F.dropout(output, args.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
        layer.mlp.gate.register_forward_hook(record_balance)
        if args.compile:
            layer.compile(dynamic=False)
    return model


def train(model: Qwen2MoeForCausalLM, parts: dict[str, bytes], args: argparse.Namespace, deadline: float) -> dict:
    """Train until `deadline`, leave the best weights by validation in `model` and return the log."""
    device = model.device
    ids = torch.frombuffer(bytearray(parts["train"]), dtype=torch.uint8).to(device)
    window = torch.arange(CONTEXT + 1, device=device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    gates = [layer.mlp.gate for layer in model.model.layers]

    curve: list[dict] = []
    best, best_state = math.inf, {}
    recent, balances = [], []
    step, start, next_eval, finished = 0, None, 0.0, False
    while not finished:
        now = time.monotonic()
        start = now if step <= 3 else start  # the first steps compile
        done = (now - start) / max(deadline - start, 1e-9)
        rate = args.lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate

        model.train()
        at = torch.randint(len(ids) - CONTEXT, (args.batch, 1), device=device)
        batch = ids[at + window].long()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        balance = torch.stack([gate.balance for gate in gates]).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(loss.detach())
        balances.append(balance.detach())
        if step % 10 == 0:
            recent[-1].item()  # wait for the device, so that the clock above sees the work and not its launch

        finished = done >= 1 or step == args.max_steps
        if finished or done >= next_eval:
            next_eval = done + 0.04
            model.eval()
            with torch.compiler.set_stance("force_eager"):
                validation = bits_per_byte(model, parts["validation"], CONTEXT, 64)
            train_bits = float(torch.stack(recent).mean()) / math.log(2)
            balance_mean = float(torch.stack(balances).mean())
            recent, balances = [], []
            row = {"step": step, "seconds": round(time.monotonic() - start, 1), "train_bpb": round(train_bits, 4)}
            curve.append(row | {"validation_bpb": round(validation, 4), "balance": round(balance_mean, 4), "lr": rate})
            print(json.dumps(curve[-1]), flush=True)
            if validation < best:
                best, best_state = validation, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "bytes_seen": step * args.batch * CONTEXT,
        "epochs": round(step * args.batch * CONTEXT / len(ids), 2),
        "seconds_after_compile": round(time.monotonic() - start, 1),
        "curve": curve,
    }


def measure(folder: Path, parts: dict[str, bytes], ngram: KneserNeyTrigram, device: torch.device) -> dict:
    """Bits per byte of the n-gram and of the stored bfloat16 weights, computed in float32."""
    model = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model = model.to(device).eval()
    torch.set_float32_matmul_precision("highest")
    figures = {}
    for name in ("validation", "heldout", "demo"):
        contexts = {f"model_context_{n}": bits_per_byte(model, parts[name], n, 32) for n in (CONTEXT, DEMO_CONTEXT)}
        figures[f"{name}_bpb"] = {"ngram": ngram.bits_per_byte(parts[name])} | contexts
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="one verse a line, as 'Ge1:1 In the beginning ...'")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock budget, counted from the start")
    parser.add_argument("--max-steps", type=int, default=0, help="stop earlier (0: only by the clock)")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--shared", type=int, default=128, help="intermediate size of the shared expert")
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 bytes in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer")
    parser.add_argument("--measure", action="store_true", help="train nothing: print the figures of the model in --out")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.suppress_errors = True  # a layer that cannot be compiled runs eagerly
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = args.text.read_text(encoding="ascii")
    parts = split(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_bytes(parts["demo"])
    ngram = KneserNeyTrigram().fit(parts["train"])
    ngram.save(args.out / "ngram3.safetensors")

    if args.measure:
        print(json.dumps(measure(args.out, parts, ngram, device), indent=1))
        return

    own_forward, Qwen2MoeExperts.forward = Qwen2MoeExperts.forward, dense_experts
    model = make_model(args, device)
    log = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("text", "out", "measure")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "bytes": {name: len(part) for name, part in parts.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
    }
    log |= train(model, parts, args, deadline)

    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    Qwen2MoeExperts.forward = own_forward
    log |= measure(args.out, parts, ngram, device)
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps({k: v for k, v in log.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
