"""One MoE block of transformers, as moe_core's runner with the same results."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ... import routing
from ...config import MoEConfig
from ...errors import ConversionError
from .adapters import ADAPTERS, Adapter
from .experts import Part, read_experts
from .modules import ConvertedShared, FromSlots
from .shared import apart, chain, fits, read_shared
from .slots import Slot, take


class ConvertedBlock(FromSlots):
    """One whole MoE block: router, routed and shared experts, with the results of the block it replaces.

    The router's module stays, for the names of its parameters and for those who watch it: it runs where it has hooks
    (``output_router_logits=True`` installs one), and what it returns reaches nobody else. A router that is random while
    training does route then.
    """

    def __init__(
        self, block: nn.Module, adapter: Adapter, config: MoEConfig, slots: list[Slot], *, repeats: int
    ) -> None:
        stays = (adapter.router, *adapter.input_transform, *adapter.output_transform)
        taken = {name: block.get_submodule(name) for name in stays}
        after = getattr(block, adapter.after) if adapter.after else None
        if isinstance(after, nn.Module):
            taken[str(adapter.after)] = after
        super().__init__(config, block, slots, taken)
        if isinstance(after, nn.Parameter):
            self.register_parameter(str(adapter.after), after)
        self.bias_path = self._bias_beside(adapter.router)
        self.repeats = repeats
        self.jitter = float((attrgetter(adapter.jitter)(block) if adapter.jitter else None) or 0.0)
        self.shared_name: str | None = None

    @property
    def adapter(self) -> Adapter:
        """How it was read, which says what it returns."""
        return ADAPTERS[self.converted_from]

    def _bias_beside(self, router: str) -> str | None:
        """The path of a correction bias that the block hands to its router."""
        for stored in self.slots:
            if stored.slot.field == "e_score_correction_bias" and not stored.path.startswith(f"{router}."):
                return stored.path
        return None

    def keep_shared(self, name: str, module: nn.Module) -> None:
        """Shared experts beside the routed ones' runner."""
        self.shared_name = name
        self.add_module(name, module)

    def runner_options(self) -> dict[str, Any]:
        """The modules that stay, in the runner's places."""
        adapter = self.adapter
        return {
            "shared_experts": self._shared_module() if self.repeats == 1 else None,
            "routed_input_transform": chain([self.get_submodule(name) for name in adapter.input_transform]),
            "routed_output_transform": chain([self.get_submodule(name) for name in adapter.output_transform]),
        }

    def _shared_module(self) -> nn.Module | None:
        return None if self.shared_name is None else self.get_submodule(self.shared_name)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Any:
        """As the block it replaces."""
        adapter = self.adapter
        if self.training and self.jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            hidden_states = hidden_states * noise
        # A flat result comes with an input that may have been flattened by a mask.
        width = self.config.hidden_size if adapter.result == "flat" else hidden_states.shape[-1]
        rows = hidden_states.reshape(-1, width)
        if self.training and adapter.random_router:
            _, weights, ids = self._ask_router(rows, input_ids)
            return self.run(rows, topk_weights=weights, topk_ids=ids).view(hidden_states.shape)
        router: Any = self._modules[adapter.router]
        if router._forward_hooks or router._forward_pre_hooks:
            self._ask_router(rows.clone() if self.training else rows, input_ids)  # some multiply noise into it
        if adapter.result == "hidden":
            out = self.run(hidden_states, input_ids=input_ids)
            return out if adapter.after is None else self._behind(out, getattr(self, adapter.after))
        return self._with_routing(hidden_states, rows)

    def _ask_router(self, rows: Tensor, input_ids: Tensor | None) -> Any:
        router = self.get_submodule(self.adapter.router)
        x = rows if self.adapter.router_dims == 2 else rows.unsqueeze(0)
        if self.config.hash_routing:
            return router(x, input_ids)
        return router(x) if self.bias_path is None else router(x, attrgetter(self.bias_path)(self))

    def _behind(self, out: Tensor, after: Any) -> Tensor:
        return after(out) if isinstance(after, nn.Module) else out + after  # type: ignore[no-any-return]

    def _with_routing(self, hidden_states: Tensor, rows: Tensor) -> Any:
        """Blocks that return more than hidden states, or not in the shape of their input."""
        result = self.adapter.result
        if result == "batches":
            return self.run(rows).view(hidden_states.shape[0], -1, rows.shape[-1])
        weights = self.runner.weights
        router_logits = routing.router_logits_of(self.config, weights, rows)
        if self.repeats > 1:
            return self._each_choice_apart(rows, router_logits), router_logits.to(rows.dtype)
        if result == "flat":
            return self.run(rows, router_logits=router_logits).flatten(), router_logits.flatten()
        if result == "logits":
            return self.run(rows, router_logits=router_logits), router_logits.to(rows.dtype)
        found = routing.route(self.config, weights, router_logits)
        out = self.run(rows, topk_weights=found.topk_weights, topk_ids=found.topk_ids).view(hidden_states.shape)
        if result == "shares":
            return out, found.topk_weights / self.config.top_k
        return out, found.topk_weights.to(rows.dtype)

    def _each_choice_apart(self, rows: Tensor, router_logits: Tensor) -> Tensor:
        """Weights on the input with more than one choice: each choice is a token of its own."""
        values, ids = routing.top_k_stable(router_logits.float(), self.repeats)
        repeated = rows.repeat_interleave(self.repeats, dim=0)
        scores = routing.score(self.config.scoring_func, values)
        apart = self.run(repeated, topk_weights=scores.reshape(-1, 1), topk_ids=ids.reshape(-1, 1))
        out = apart.view(-1, self.repeats, rows.shape[-1]).sum(1)
        shared = self._shared_module()
        return out if shared is None else out + shared(rows)


def convert_known(block: nn.Module, adapter: Adapter) -> ConvertedBlock:
    """The block that ``adapter`` describes.

    Raises:
        ConversionError, ConfigError, WeightsError: something about it is not as described, or moe_core refuses it.
    """
    routed = adapter.experts(block) if adapter.experts else read_experts(block.get_submodule("experts"), "experts.")
    router = block if adapter.reads_block else block.get_submodule(adapter.router)
    gate = adapter.route(router, f"{adapter.router}.")
    fields, slots = {**routed.fields, **gate.fields}, [*routed.slots, *gate.slots]
    hidden = _hidden_size(block, gate)
    latent = fields.pop("expert_hidden_size")
    if latent != hidden:
        fields["moe_latent_size"] = latent
    if adapter.output_scale is not None:
        factor = float(getattr(block, adapter.output_scale))
        fields |= {"routed_scaling_factor": factor, "apply_routed_scale_to_output": factor != 1.0}
    repeats = 1
    if fields.get("apply_router_weight_on_input") and fields["top_k"] > 1:
        repeats, fields["top_k"] = fields["top_k"], 1
    if adapter.combination is not None:
        # An average is (routed + shared) / 2, however many shared experts were packed together.
        fields["shared_expert_combination"] = getattr(block, adapter.combination)
    beside: ConvertedShared | None = None
    idle: nn.Module | None = None  # of no width: it stays for its names
    shared = getattr(block, adapter.shared, None) if adapter.shared else None
    if shared is not None:
        part, act = read_shared(shared)
        if part.fields["shared_intermediate_size"] == 0 and shared.down_proj.bias is None:
            idle = shared
        elif repeats == 1 and fits(fields, act):
            fields |= part.fields
            slots += [slot.below(f"{adapter.shared}.") for slot in part.slots]
            if adapter.shared_gate is not None:
                fields["shared_expert_gate"] = True
                slots.append(Slot("shared_gate_weight", (f"{adapter.shared_gate}.weight",)))
        elif adapter.shared_gate is not None:
            raise ConversionError(
                f"{type(block).__name__}: its gated shared experts compute {act}, its routed ones do not"
            )
        else:
            beside = ConvertedShared(apart(part, act, hidden), shared)
    converted = ConvertedBlock(block, adapter, MoEConfig(hidden_size=hidden, **fields), slots, repeats=repeats)
    if idle is not None:
        converted.add_module(str(adapter.shared), idle)
    if beside is not None:
        converted.keep_shared(str(adapter.shared), beside)
    return converted


def _hidden_size(block: nn.Module, gate: Part) -> int:
    name = next(slot.names[0] for slot in gate.slots if slot.field == "gate_weight")
    return int(take(block, name).shape[1])
