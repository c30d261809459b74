"""The modules that stand where transformers' were: their tensors, and moe_core's runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...config import MoEConfig
from ...errors import InputError
from ...layer import BoundModule
from ...weights import MoEWeights, check_weights
from .experts import Part
from .slots import Slot, StoredSlot, load_names, save_names, store


class FromSlots(BoundModule):
    """Holds the tensors of slots: the originals where the layout allows, under transformers' names in state_dict."""

    def __init__(self, config: MoEConfig, source: nn.Module, slots: list[Slot], taken: dict[str, nn.Module]) -> None:
        super().__init__(config)
        self.training = source.training
        self.converted_from = type(source).__name__
        for name, module in taken.items():
            self.add_module(name, module)
        self.slots: tuple[StoredSlot, ...] = store(self, source, slots)
        self._register_state_dict_hook(_save_hook)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_hook)  # type: ignore[no-untyped-call]
        check_weights(config, self.weights())

    def weights(self) -> MoEWeights:
        """Views in the canonical layout; gradients reach the stored parameters through them."""
        tensors = {}
        with torch.inference_mode(False), torch.enable_grad():
            for stored in self.slots:
                tensor = stored.tensor(self)
                tensors[stored.slot.field] = tensor if stored.slot.view is None else stored.slot.view(tensor)
        return MoEWeights(**tensors)

    def still_bound(self) -> bool:
        """Whether nothing that the runner was bound to is another now."""
        return self._bound_to == self.identity()

    def identity(self) -> list[Any]:
        """Views die with the storage they look at, computed ones with every write."""
        facts: list[Any] = []
        for stored in self.slots:
            tensor = stored.tensor(self)
            facts += (id(tensor), tensor.dtype, tensor.device, tensor.requires_grad)
            if stored.slot.view is not None:
                facts.append(tensor.data_ptr())
            if stored.computed and not tensor.is_inference():
                facts.append(tensor._version)
        return facts

    def exact_tensor(self) -> Tensor | None:
        """The correction bias, wherever the original keeps it."""
        found = [stored.tensor(self) for stored in self.slots if stored.slot.field == "e_score_correction_bias"]
        return found[0] if found else None

    def run(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        """The runner, in the weights' dtype; under autocast the input may have another, as it may for nn.Linear."""
        dtype = hidden_states.dtype
        if not torch.is_autocast_enabled(hidden_states.device.type):
            return self.runner(hidden_states, **inputs)
        return self.runner(hidden_states.to(self.dtype), **inputs).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the expert weights."""
        return next(stored.tensor(self).dtype for stored in self.slots if stored.slot.field == "w13_weight")

    def extra_repr(self) -> str:
        """What it replaces, then the sizes."""
        return f"{self.converted_from}, {super().extra_repr()}"


def _save_hook(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    save_names(module.slots, state, prefix)


def _load_hook(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    load_names(module.slots, state, prefix)


class ConvertedExperts(FromSlots):
    """Routed experts behind a router that is not moe_core's, called as the experts that they replace.

    Args:
        part: fields and slots of ``source``.
        call: what the original's forward takes and returns: a function of this module and those arguments.
    """

    def __init__(self, part: Part, source: nn.Module, call: Callable[..., Tensor]) -> None:
        fields = dict(part.fields)
        config = MoEConfig(hidden_size=fields.pop("expert_hidden_size"), top_k=1, **fields)
        super().__init__(config, source, part.slots, {})
        self.call = call

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """As the experts module it replaces."""
        return self.call(self, *arguments, **named)

    def choose(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H], [T, K] ids and [T, K] weights to [T, H]; the id after the last is transformers' "none".

        K may differ from call to call, and exceed the experts where a router repeats ids.
        """
        topk_ids = topk_ids.masked_fill(topk_ids == self.config.num_held_experts + self.config.zero_expert_num, -1)
        self._fit(topk_ids.shape[-1])
        return self.run(hidden_states, topk_weights=topk_weights, topk_ids=topk_ids)

    def _fit(self, top_k: int) -> None:
        if top_k == self.config.top_k:
            return
        held, zeros = self.config.num_held_experts, self.config.zero_expert_num
        if top_k > held + zeros and zeros:
            raise InputError(f"top_k_index has K={top_k}: expected at most {held + zeros}, experts and zero experts")
        enough = max(held, top_k - zeros)
        local = held if enough > held else None
        self.config = dataclasses.replace(self.config, top_k=top_k, num_experts=enough, num_local_experts=local)
        self._bound_to = []


class ConvertedShared(FromSlots):
    """Shared experts that the routed experts' runner can't take along, as experts that every token chooses."""

    def __init__(self, part: Part, source: nn.Module) -> None:
        fields = dict(part.fields)
        hidden, count = fields.pop("expert_hidden_size"), fields["num_experts"]
        super().__init__(MoEConfig(hidden_size=hidden, top_k=count, **fields), source, part.slots, {})

    def forward(self, hidden_states: Tensor, gammas: Tensor | None = None) -> Tensor:
        """[..., H] to [..., H], weighted by gammas [..., S] where the router has given them."""
        count = self.config.num_experts
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if gammas is None:
            gammas = torch.ones(tokens, count, device=hidden_states.device)
        ids = torch.arange(count, device=hidden_states.device).expand(tokens, count)
        return self.run(hidden_states, topk_weights=gammas.reshape(tokens, count), topk_ids=ids)
