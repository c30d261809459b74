"""convert_block and convert_model: transformers' MoE blocks, replaced by moe_core's."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import routing
from ...config import MoEConfig
from ...errors import ConfigError, ConversionError, InputError
from ...layer import BoundModule
from ...weights import MoEWeights
from .adapters import ADAPTERS, OWN_ROUTER, Adapter
from .experts import Part, read_experts
from .shared import as_experts, chain, read_shared
from .slots import Slot, StoredSlot, load_names, save_names, store

logger = logging.getLogger("moe_core")


class _FromSlots(BoundModule):
    """Holds the tensors of slots: the originals where the layout allows, under transformers' names in state_dict."""

    def __init__(self, config: MoEConfig, source: nn.Module, slots: list[Slot]) -> None:
        super().__init__(config)
        self.training = source.training
        try:
            self.slots: tuple[StoredSlot, ...] = store(self, source, slots)
        except KeyError as missing:
            raise ConversionError(
                f"{type(source).__name__} has no parameter or buffer {missing.args[0]!r}, which its adapter expects; "
                f"was the model sharded, quantised, or changed?"
            ) from None
        self._register_state_dict_hook(_save_hook)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_hook)  # type: ignore[no-untyped-call]

    def weights(self) -> MoEWeights:
        """Views in the canonical layout; gradients reach the stored parameters through them."""
        tensors = {}
        with torch.inference_mode(False), torch.enable_grad():
            for stored in self.slots:
                tensor = getattr(self, stored.slot.field)
                tensors[stored.slot.field] = tensor if stored.slot.view is None else stored.slot.view(tensor)
        return MoEWeights(**tensors)

    def identity(self) -> tuple[Any, ...]:
        """Views die with the storage they look at, computed ones with every write."""
        facts: list[Any] = []
        for stored in self.slots:
            tensor = getattr(self, stored.slot.field)
            facts += (id(tensor), tensor.dtype, tensor.device, tensor.requires_grad)
            if stored.slot.view is not None:
                facts.append(tensor.data_ptr())
            if stored.computed and not tensor.is_inference():
                facts.append(tensor._version)
        return tuple(facts)


def _save_hook(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    save_names(module.slots, state, prefix)


def _load_hook(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    load_names(module.slots, state, prefix)


class ConvertedExperts(_FromSlots):
    """Routed experts behind a router that is not moe_core's; called as transformers calls its experts."""

    def __init__(
        self, config: MoEConfig, source: nn.Module, slots: list[Slot], unpack: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(config, source, slots)
        self.unpack = unpack

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K] ids and [T, K] weights to [T, H]; an id of ``num_experts`` is transformers' "none"."""
        if self.unpack is not None:
            top_k_index, top_k_weights = self.unpack(self, top_k_index, top_k_weights)
        else:
            top_k_index = top_k_index.masked_fill(top_k_index == self.config.num_held_experts, -1)
        self._fit(top_k_index.shape[-1])
        return self.runner(hidden_states, topk_weights=top_k_weights, topk_ids=top_k_index)

    def _fit(self, top_k: int) -> None:
        if top_k != self.config.top_k:
            self.config = _with_top_k(self.config, top_k)
            self._bound_to = ()


def _with_top_k(config: MoEConfig, top_k: int) -> MoEConfig:
    """Experts learn k from their first call; it may exceed them where a router repeats ids."""
    held = config.num_held_experts
    return dataclasses.replace(config, top_k=top_k, num_experts=max(held, top_k), num_local_experts=held)


class ConvertedBlock(_FromSlots):
    """One whole MoE block: router, routed and shared experts, with the results of the block it replaces."""

    def __init__(self, config: MoEConfig, block: Any, adapter: Adapter, slots: list[Slot], repeats: int) -> None:
        super().__init__(config, block, slots)
        self.converted_from = type(block).__name__
        self.result = adapter.result
        self.jitter = float(getattr(block, adapter.jitter) or 0.0) if adapter.jitter else 0.0
        self.repeats = repeats
        self.score_scale = 1.0
        self.kept: dict[str, tuple[str, ...]] = {"input": adapter.input_transform, "output": adapter.output_transform}
        for name in (*adapter.input_transform, *adapter.output_transform):
            self.add_module(name, getattr(block, name))
        self.after = adapter.after
        if adapter.after is not None:
            setattr(self, adapter.after, getattr(block, adapter.after))
        self.shared_name: str | None = None

    def keep_shared(self, name: str, module: nn.Module) -> None:
        """Shared experts with an activation of their own stay what they are."""
        self.shared_name = name
        self.add_module(name, module)

    def runner_options(self) -> dict[str, Any]:
        """The kept modules, in the runner's places."""
        return {
            "shared_experts": self._kept_shared() if self.repeats == 1 else None,
            "routed_input_transform": chain([self.get_submodule(name) for name in self.kept["input"]]),
            "routed_output_transform": chain([self.get_submodule(name) for name in self.kept["output"]]),
        }

    def _kept_shared(self) -> nn.Module | None:
        return None if self.shared_name is None else self.get_submodule(self.shared_name)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None, **unused: Any) -> Any:
        """As the block it replaces."""
        if self.training and self.jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            hidden_states = hidden_states * noise
        if self.result == "hidden" and self.repeats == 1:
            out = self.runner(hidden_states, input_ids=input_ids)
            return out if self.after is None else self._behind(out)
        return self._with_routing(hidden_states)

    def _behind(self, out: Tensor) -> Tensor:
        after = getattr(self, str(self.after))
        return after(out) if isinstance(after, nn.Module) else out + after  # type: ignore[no-any-return]

    def _with_routing(self, hidden_states: Tensor) -> Any:
        """Blocks that return what their router found."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = self.runner.weights
        router_logits = routing.router_logits_of(self.config, weights, x)
        if self.repeats > 1:
            return self._each_choice_apart(x, router_logits), router_logits.to(x.dtype)
        if self.result == "scores":
            found = routing.route(self.config, weights, router_logits)
            out = self.runner(x, topk_weights=found.topk_weights, topk_ids=found.topk_ids)
            scores = found.topk_weights * self.score_scale
            return out.view(hidden_states.shape), scores.to(x.dtype)
        out = self.runner(x, router_logits)
        if self.result == "flat":
            return out.flatten(), router_logits.flatten()
        return out, router_logits.to(x.dtype)

    def _each_choice_apart(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """Weights on the input with more than one choice: each choice is a token of its own."""
        values, ids = routing.top_k_stable(router_logits.float(), self.repeats)
        rows = x.repeat_interleave(self.repeats, dim=0)
        scores = routing.score(self.config.scoring_func, values)
        apart = self.runner(rows, topk_weights=scores.reshape(-1, 1), topk_ids=ids.reshape(-1, 1))
        out = apart.view(-1, self.repeats, x.shape[-1]).sum(1)
        shared = self._kept_shared()
        return out if shared is None else out + shared(x)

    def extra_repr(self) -> str:
        """The block it replaces, then the sizes."""
        return f"{self.converted_from}, {super().extra_repr()}"


def convert_block(block: nn.Module) -> nn.Module:
    """Replace one MoE block of transformers.

    Args:
        block: a block (router, routed and shared experts), or a routed experts module on its own. It is not changed.
    Returns:
        a module with the same parameters (shared, not copied, where the layout allows), the same state_dict and the
        same results. Its ``runner`` and ``report`` say what serves it.
    Raises:
        ConversionError: names the class, attribute or setting that was not recognised.
    """
    name = type(block).__name__
    try:
        if name in ADAPTERS:
            return _convert_known(block, ADAPTERS[name])
        if name in OWN_ROUTER:
            return _convert_own_router(block)
        if name.endswith("Experts") and not hasattr(block, "experts"):
            return convert_experts(block)
    except ConfigError as error:
        raise ConversionError(f"{name} describes a layer that moe_core refuses: {error}") from error
    children = ", ".join(child for child, _ in block.named_children()) or "none"
    raise ConversionError(
        f"{name} is not recognised as an MoE block (its submodules: {children}); known are {', '.join(ADAPTERS)}, "
        f"{', '.join(OWN_ROUTER)} and decorated experts modules; use moe_core.MoERunner with its weights"
    )


def convert_model(model: nn.Module) -> list[str]:
    """Replace every MoE block of ``model`` in place.

    Experts whose router lives in the decoder layer itself are replaced alone; the layer goes on calling its router.

    Returns:
        the names of what was replaced, in the order of the model's modules.
    Raises:
        ConversionError: something in it looks like routed experts and is not recognised; the model is not changed then.
    """
    replacements: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done in replacements):
            continue
        kind = type(module).__name__
        if kind in ADAPTERS or kind in OWN_ROUTER or _is_experts(module):
            replacements[name] = convert_block(module)
    if not replacements:
        raise ConversionError(
            f"{type(model).__name__} holds no MoE block that is known here; convert_model replaces "
            f"{', '.join(ADAPTERS)}, {', '.join(OWN_ROUTER)} and decorated experts modules"
        )
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    logger.info("replaced %d MoE blocks of %s", len(replacements), type(model).__name__)
    return list(replacements)


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts") and isinstance(
        getattr(module, "gate_up_proj", getattr(module, "up_proj", None)), nn.Parameter
    )


def _convert_known(block: Any, adapter: Adapter) -> ConvertedBlock:
    routed = _routed_experts(block)
    router = block if adapter.route is ADAPTERS["DbrxFFN"].route else getattr(block, adapter.router)
    gate = adapter.route(router, f"{adapter.router}.")
    fields = {**routed.fields, **gate.fields}
    slots = [*routed.slots, *gate.slots]
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
    kept_shared = None
    shared = getattr(block, adapter.shared, None) if adapter.shared else None
    if shared is not None:
        part, act = read_shared(shared, f"{adapter.shared}.")
        fits = repeats == 1 and all(_same(fields, key, value) for key, value in act.items())
        fits = fits and _activation_keys(act) == _activation_keys(fields)
        if fits:
            slots += part.slots
            fields |= part.fields
            if adapter.shared_gate is not None:
                fields["shared_expert_gate"] = True
                slots.append(Slot("shared_gate_weight", (f"{adapter.shared_gate}.weight",)))
        elif adapter.shared_gate is not None:
            raise ConversionError(
                f"{type(block).__name__}: its gated shared experts compute {act}, its routed ones do not"
            )
        else:
            kept_shared = shared
        if getattr(block, "shared_expert_combination_strategy", "sum") == "average":
            fields["shared_expert_combination"] = "average"  # (routed + shared) / 2, however many were packed together
    config = MoEConfig(hidden_size=hidden, **fields)
    converted = ConvertedBlock(config, block, adapter, slots, repeats)
    if kept_shared is not None and adapter.shared is not None:
        converted.keep_shared(adapter.shared, kept_shared)
    if type(block).__name__ == "OpenAIPrivacyFilterMLP":
        converted.score_scale = 1.0 / config.top_k
    return converted


_ACTIVATION = ("gated", "activation", "swiglu_limit", "swiglu_alpha", "swiglu_beta", "custom_activation_function")


def _activation_keys(fields: dict[str, Any]) -> set[str]:
    return {key for key in _ACTIVATION if key in fields and key != "gated"}


def _same(fields: dict[str, Any], key: str, value: Any) -> bool:
    found = fields.get(key, True if key == "gated" else None)
    return bool(found == value) or (callable(found) and type(found) is type(value) and repr(found) == repr(value))


def _routed_experts(block: Any) -> Part:
    if type(block).__name__ == "JetMoeMoE":
        count, rows, hidden = block.input_linear.weight.shape
        from .activations import activation

        return Part(
            {
                "num_experts": count,
                "expert_hidden_size": hidden,
                "intermediate_size": rows // 2,
                "activation": activation(block.activation),
            },
            [Slot("w13_weight", ("input_linear.weight",)), Slot("w2_weight", ("output_linear.weight",))],
        )
    return read_experts(block.experts, "experts.")


def _hidden_size(block: Any, gate: Part) -> int:
    name = next(slot.names[0] for slot in gate.slots if slot.field == "gate_weight")
    return int(block.get_parameter(name).shape[1])


def convert_experts(experts: nn.Module, unpack: Callable[..., Any] | None = None, top_k: int = 1) -> ConvertedExperts:
    part = read_experts(experts)
    hidden = part.fields.pop("expert_hidden_size")
    part.fields.pop("zero_expert_num", None)
    part.fields.pop("zero_expert_type", None)
    return ConvertedExperts(MoEConfig(hidden_size=hidden, top_k=top_k, **part.fields), experts, part.slots, unpack)


def _convert_own_router(block: Any) -> nn.Module:
    """A shallow copy whose experts are replaced; its forward, which hands ids and weights in, stays."""
    kind = type(block).__name__
    converted = copy.copy(block)
    converted._modules = dict(block._modules)
    unpack = {"NllbMoeSparseMLP": _nllb_choices, "SwitchTransformersSparseMLP": _switch_choices}.get(kind)
    converted.experts = convert_experts(block.experts, unpack)
    if kind == "NllbMoeSparseMLP":
        converted.experts.dropout = float(block.experts.moe_token_dropout)
    if kind == "InklingMoE":
        part = as_experts(block.shared_experts)
        hidden, count = part.fields.pop("expert_hidden_size"), part.fields["num_experts"]
        config = MoEConfig(hidden_size=hidden, top_k=count, **part.fields)
        converted.shared_experts = _AllChosen(config, block.shared_experts, part.slots)
    return converted  # type: ignore[no-any-return]


class _AllChosen(_FromSlots):
    """Inkling's shared experts: every token takes all of them, weighted by the router's gammas."""

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        """[..., H] and gammas [..., S] to [..., H]."""
        count = self.config.num_experts
        gammas = gammas.reshape(-1, count)
        ids = torch.arange(count, device=gammas.device).expand_as(gammas)
        return self.runner(hidden_states, topk_weights=gammas, topk_ids=ids)


def _nllb_choices(experts: Any, router_mask: Tensor, router_probs: Tensor) -> tuple[Tensor, Tensor]:
    """NLLB hands its experts a 0/1 mask [T, E] where they read ids, so token t gets expert mask[t, e] with weight
    probs[t, e], for every e. Converted as it is: same outputs."""
    if experts.training and experts.dropout > 0:
        raise InputError(
            f"moe_token_dropout={experts.dropout} while training: expected 0 or eval(); moe_core drops no tokens"
        )
    return router_mask.long(), router_probs * (1.0 - experts.dropout)


def _switch_choices(experts: Any, selected: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot [T, 1, E], all zero where the expert was full, to ids with -1."""
    ids = selected.argmax(dim=-1)
    return ids.masked_fill(selected.sum(dim=-1) == 0, -1), weights
