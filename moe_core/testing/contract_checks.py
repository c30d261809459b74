"""What a backend promises besides values: bits, memory, threads, both entries, gradients."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from .. import ops
from ..errors import WeightsError
from ..quant.layout import MATRICES
from ..types import ExpertsOut, Pending, Routing
from ..weights import MoEWeights
from .harness import FULL, PLAIN, TOKENS, Oracle, Subject, expect, expect_close, over
from .layer_checks import LAYERS
from .quant_checks import QuantChecks

THREADS, ROUNDS = 2, 8
NOT_TRAINED = ("e_score_correction_bias", "tid2eid")
TRAINED = (
    "plain",
    "full",
    "topk_softmax_gate_bias",
    "group_max",
    "bias",
    "swiglu_alpha",
    "relu2_ungated",
    "zero_experts",
    "weight_on_input",
    "post_expert_norm",
    "shared_bias",
    "shared_gate_average",
    "shared_output_scaled",
)


def storages(device: torch.device) -> dict[int, int]:
    """Address -> bytes of the memory that tensors on a device hold now."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Subclasses may hold no numbers, and a library's own layout, such as oneDNN's, has no storage.
        plain = type(thing) in (Tensor, torch.nn.Parameter) and thing.layout is torch.strided
        if plain and thing.device.type == device.type:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def has_addresses(device: torch.device) -> bool:
    """Whether tensors on a device say where their memory is; a lazy tensor may have none yet."""
    try:
        return torch.empty(1, device=device).untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def trainable(weights: MoEWeights) -> MoEWeights:
    """The same tensors, as leaves that require gradients."""
    for name, tensor in weights.named_tensors():
        tensor.requires_grad_(name not in NOT_TRAINED)
    return weights


class ContractChecks(QuantChecks):
    """The traits, checked: what was declared is what happens."""

    def test_same_bits(self) -> None:
        """Equal calls give equal bits, in one binding and in another, unless the trait says otherwise."""
        subject, again = self.bind(FULL), self.bind(FULL)
        if not subject.deterministic:
            pytest.skip(f"{self.backend} declares deterministic=False")
        x = subject.hidden(65)
        first = subject.runner(x).clone()
        subject.runner(subject.hidden(7, seed=9))
        subject.expect_same(subject.runner(x), first, "the same call again")
        subject.expect_same(again.runner(x), first, "the same call on another binding")

    @over(["layer", "logits", "ids", "gate", "shared_experts", "experts", "reduce"])
    def test_inputs_unchanged(self, case: str) -> None:
        """Nothing that a call or a stage is given is written to, but hidden_states where ``mutates_input`` says so."""
        subject = self.bind(FULL)
        x, oracle = subject.hidden(), subject.oracle
        routing, logits = subject.routing(oracle.gate(x)), subject.here(oracle.logits(x))
        value, shared = subject.here(oracle.experts(x, oracle.gate(x)).value), x.float().clone()
        given = {"hidden_states": x, "router_logits": logits, **routing._asdict(), "experts' output": value}
        given |= {"shared experts' output": shared, **dict(subject.runner.weights.named_tensors())}
        before = {name: tensor.clone() for name, tensor in given.items()}
        if case in ("layer", "logits"):
            subject.runner(x, logits if case == "logits" else None)
        elif case == "ids":
            subject.need_callers_routing()
            subject.runner(x, topk_weights=routing.topk_weights, topk_ids=routing.topk_ids)
        elif case == "gate":
            subject.stage(case)(x, logits, None)
        elif case == "shared_experts":
            subject.stage(case)(x).result()
        elif case == "experts":
            subject.stage(case)(x, None if subject.owns_routing else routing, logits)
            if subject.traits()[case]["mutates_input"]:
                del given["hidden_states"]
        else:
            subject.stage(case)(routing, ExpertsOut(value, False), Pending(shared))
        for name, tensor in given.items():
            expect(torch.equal(tensor, before[name]), f"{case} changed {name}")

    def test_output_is_new(self) -> None:
        """A result shares no memory with inputs, weights or an earlier result, which later calls leave as it is."""
        subject = self.bind(FULL)
        x = subject.hidden()
        first = subject.runner(x)
        kept = first.clone()
        second = subject.runner(subject.hidden(seed=9))
        expect(torch.equal(first, kept), "a later call changed an earlier result")
        if not has_addresses(subject.runner.device):
            return
        others = {"hidden_states": x, "a later result": second, **dict(subject.runner.weights.named_tensors())}
        for name, tensor in others.items():
            same = first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            expect(not same, f"the result shares memory with {name}")

    def test_changed_weights(self) -> None:
        """Weights that are written to after the bind are never used stale."""
        subject = self.bind(FULL)
        x = subject.hidden()
        logits = subject.here(subject.oracle.logits(x))
        subject.runner(x, logits)
        for _, tensor in subject.runner.weights.named_tensors():
            tensor.mul_(0.5)
        expected = Oracle(subject.oracle.config, subject.runner.weights).gate(x, logits)
        oracle = Oracle(subject.oracle.config, subject.runner.weights)
        subject.expect_layer(subject.runner(x, logits), oracle.layer(x, expected), "after weights changed in place")

    @over(("plain", "full", "shared_bias"))
    def test_consumed_weights(self, case: str) -> None:
        """A backend that takes the weights' memory (``consume_weights``) computes the same; nobody reads them again."""
        fields = {**LAYERS[case], "check_layout": True}
        kept, given = self.bind(fields), self.bind(fields, consume_weights=True)
        x = kept.hidden()
        given.expect_same(given.runner(x), kept.runner(x), "with consume_weights=True")
        for name, tensor in given.runner.weights.named_tensors():
            if name in MATRICES and tensor.is_meta:
                with pytest.raises(WeightsError, match=name):
                    given.runner.refresh()

    def test_memory_kept(self) -> None:
        """Between calls a backend holds no more memory than ``workspace_bytes`` declares; results are the caller's."""
        subject = self.bind(FULL)
        if not has_addresses(subject.runner.device):
            pytest.skip(f"tensors on {subject.runner.device} have no addresses to count by")
        declared = sum(traits["workspace_bytes"] for traits in subject.traits().values())
        inputs = [subject.hidden(tokens) for tokens in (3, 64, 129)]
        subject.runner(inputs[0])
        before = storages(subject.runner.device)
        for x in inputs:
            subject.runner(x)
        new = {address: size for address, size in storages(subject.runner.device).items() if address not in before}
        kept = sum(new.values())
        expect(kept <= declared, f"{kept} bytes stay allocated after calls, workspace_bytes declares {declared}")

    def test_entries(self) -> None:
        """The op and the Python entry are one computation."""
        for fields in (PLAIN, FULL):
            subject = self.bind(fields)
            x = subject.hidden()
            by_op = ops.call(subject.runner, x, None, None, None, None)
            by_python = subject.runner.run(subject.binding, x, None, None, None, None)
            subject.expect_same(by_op, by_python, "the op's entry against the Python entry")

    def test_threads(self) -> None:
        """Threads that call one runner at once do not see each other's scratch memory."""
        subject = self.bind(FULL)
        inputs = [subject.hidden(seed=thread) for thread in range(THREADS)]
        alone = [subject.runner(x).clone() for x in inputs]
        start, faults = threading.Barrier(THREADS), []

        def work(thread: int) -> None:
            try:
                start.wait(60)
                for _ in range(ROUNDS):
                    subject.expect_same(subject.runner(inputs[thread]), alone[thread], f"thread {thread}")
            except BaseException as fault:  # shown by the thread that waits
                faults.append(fault)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]

    @over(TRAINED)
    def test_backward(self, case: str) -> None:
        """Gradients of input, router, experts and shared experts against autograd through the reference."""
        subject = self.bind(LAYERS[case], weights=trainable, needs_grad=True)
        x = subject.hidden(64)
        x = x[subject.here(subject.oracle.clear_rows(x))][:24].clone().requires_grad_()
        self.check_gradients(subject, x, None)

    def test_backward_of_input_alone(self) -> None:
        """Frozen weights: the input still gets its gradient."""
        subject = self.bind(FULL, needs_grad=True)
        x = subject.hidden(64)
        x = x[subject.here(subject.oracle.clear_rows(x))][:24].clone().requires_grad_()
        self.check_gradients(subject, x, None)

    def test_backward_of_unchosen_expert(self) -> None:
        """An expert that nobody chose gets a gradient of exactly zero, and its values reach no other gradient."""
        subject = self.bind({"top_k": 2, "expert_bias": True}, weights=trainable, needs_grad=True)
        subject.need_callers_routing()
        for tensor in (subject.runner.weights.w13_weight, subject.runner.weights.w2_weight):
            assert tensor is not None
            tensor.data[5] = float("nan")
        ids = (torch.arange(2 * TOKENS).view(TOKENS, 2) % 5).int()
        weights = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(4)).to(subject.runner.device)
        x = subject.hidden().requires_grad_()
        subject.runner.refresh()
        self.check_gradients(subject, x, Routing(weights.requires_grad_(), subject.here(ids)))
        for name, tensor in subject.runner.weights.named_tensors():
            if name.startswith("w") and tensor.grad is not None:
                expect(not tensor.grad[5].any(), f"the gradient of {name} of an unchosen expert is not zero")

    def check_gradients(self, subject: Subject, x: Tensor, routing: Routing | None) -> None:
        """One backward pass on both sides, each gradient compared."""
        oracle = Oracle(subject.oracle.config, subject.runner.weights)
        mine = dict(subject.runner.weights.named_tensors())
        theirs = dict(oracle.weights.named_tensors())
        for name, tensor in mine.items():
            theirs[name].requires_grad_(tensor.requires_grad)
        x_cpu = x.detach().cpu().float().requires_grad_()
        inputs = {"hidden_states": (x, x_cpu)}
        if routing is None:
            out, expected = subject.runner(x), oracle.layer(x_cpu)
        else:
            weights = routing.topk_weights.detach().cpu().requires_grad_()
            inputs["topk_weights"] = (routing.topk_weights, weights)
            out = subject.runner(x, topk_weights=routing.topk_weights, topk_ids=routing.topk_ids)
            expected = oracle.layer(x_cpu, Routing(weights, routing.topk_ids))
        expect(out.requires_grad, "the output requires no gradient: it was lost in a stage")
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
        out.backward(upstream.to(out))
        expected.backward(upstream.to(out.dtype).float())
        inputs |= {name: (tensor, theirs[name]) for name, tensor in mine.items() if tensor.requires_grad}
        for name, (leaf, wanted) in inputs.items():
            if wanted.grad is None:
                continue
            expect(leaf.grad is not None, f"{name} got no gradient")
            assert leaf.grad is not None
            expect_close(leaf.grad, wanted.grad, subject.dtype, "backward", f"the gradient of {name}")
