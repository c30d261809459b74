"""Experts spread over the chips of a mesh, by manual sharding: each chip runs its own, and one all-reduce sums.

``mark_sharding`` on the experts is not enough. The partitioner does not look into a grouped product: on XLA's CPU
device the numbers are right, but compiled for a TPU every chip multiplies with its own experts alone and nothing is
summed. :func:`check_not_marked` makes that an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as spmd
from torch import Tensor
from torch_xla.core.xla_builder import create_placeholder_tensor

from moe_core import MoEConfig, MoEWeights, Routing
from moe_core.errors import BindError, ConfigError, InputError

from . import adapter
from .buckets import bucket_of, pad_rows
from .spec import Spec, is_named, spec_of
from .target import ahead_of_time, chip
from .tuning import choose


def sharding_of(tensor: Tensor) -> str:
    """What ``mark_sharding`` said of a tensor; empty where it said nothing."""
    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


def check_not_marked(weights: MoEWeights) -> None:
    """Refuse experts that ``mark_sharding`` has spread over devices.

    Raises:
        BindError: says why, and what to use.
    """
    for name in ("w13_weight", "w2_weight"):
        tensor = getattr(weights, name)
        spec = sharding_of(tensor)
        if spec and "replicated" not in spec:
            raise BindError(
                f"{name} was spread over devices by mark_sharding ({spec}), expected an unsharded tensor: XLA's "
                f"partitioner does not look into a grouped product, and compiled for a TPU the result would lack the "
                f"other devices' experts; use moe_tpu.parallel.ExpertParallel, which shards by hand"
            )


class ExpertParallel:
    """The routed experts of one layer, an equal share on each device of a mesh; tokens and routing are replicated.

    Args:
        config: of the layer, with the global number of experts.
        weights: on the XLA device, in SPMD mode, unsharded; this object keeps sharded, packed copies.
        mesh: of ``torch_xla.distributed.spmd``. axis: the name of the axis that the experts are spread over.
        form: of the products, ``ragged`` or ``gmm``; None leaves it to the tuning table.
    Raises:
        ConfigError: experts that do not divide, zero experts, or an activation that is no name.
        BindError: weights that ``mark_sharding`` has sharded already.
    """

    def __init__(
        self, config: MoEConfig, weights: MoEWeights, mesh: spmd.Mesh, axis: str = "ep", *, form: str | None = None
    ) -> None:
        self.config, self.mesh, self.axis = config, mesh, axis
        self.devices = int(mesh.shape()[axis])
        if config.num_experts % self.devices or config.num_held_experts != config.num_experts:
            raise ConfigError(
                f"num_experts={config.num_experts} (held here: {config.num_held_experts}): expected all of them, a "
                f"multiple of the {self.devices} devices of axis {axis!r}"
            )
        if config.zero_expert_num or not is_named(config):
            raise ConfigError(
                f"zero_expert_num={config.zero_expert_num}, activation={config.activation!r}: expected no zero "
                f"experts and an activation by name; every device would add the zero experts' share"
            )
        check_not_marked(weights)
        self.local = config.num_experts // self.devices
        self.base, self.form = dataclasses.replace(spec_of(config), held=self.local), form
        self.norm = weights.post_expert_norm_weight
        self._shard(weights)

    def _shard(self, weights: MoEWeights) -> None:
        from .layout import pack

        parts = (*pack(self.config, weights), weights.w13_bias, weights.w2_bias)
        self.sharded = [None if part is None else self._spread(part) for part in parts]
        if ahead_of_time():
            self.first = create_placeholder_tensor((self.devices,), torch.int32)
        else:
            firsts = torch.arange(self.devices, dtype=torch.int32) * self.local
            self.first = self._spread(firsts.to(torch_xla.device()))

    def _spread(self, tensor: Tensor) -> Tensor:
        if not ahead_of_time():  # what holds no values lies on no device yet
            spmd.mark_sharding(tensor, self.mesh, self._by_expert(tensor))
        return tensor

    def _local(self, tensor: Tensor | None, by_expert: bool) -> Any:
        """One device's part of a sharded tensor, or all of a replicated one, as manual sharding sees it."""
        if tensor is None:
            return None
        spec = self._by_expert(tensor) if by_expert else (None,) * tensor.ndim
        if not ahead_of_time():
            return spmd.enable_manual_sharding(tensor, spec, mesh=self.mesh).global_tensor
        marked = spmd.annotate_custom_sharding(tensor, self.mesh, spec)
        return torch_xla._XLAC._spmd_full_to_shard_shape(getattr(marked, "global_tensor", marked))

    def _by_expert(self, tensor: Tensor) -> tuple[str | None, ...]:
        return (self.axis, *[None] * (tensor.ndim - 1))

    def __call__(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """[T, H] float32, weighted and summed, from [T, H] and global ids.

        Raises:
            InputError: no tokens.
        """
        tokens, width = hidden_states.shape
        if not tokens:
            raise InputError("hidden_states has 0 rows, expected at least one: every device enters the all-reduce")

        rows = bucket_of(tokens)
        padded = (
            pad_rows(hidden_states, rows),
            pad_rows(routing.topk_weights, rows),
            pad_rows(routing.topk_ids, rows, -1),
        )
        x, topk_weights, ids, norm = (self._local(tensor, False) for tensor in (*padded, self.norm))
        gate, up, down, b13, b2, first = (self._local(tensor, True) for tensor in (*self.sharded, self.first))
        # Elsewhere's experts are nobody's here; -1 stays below 0.
        here = torch.where((ids >= first) & (ids < first + self.local), ids - first, torch.full_like(ids, -1))
        part = adapter.routed(x, topk_weights, here, gate, up, down, b13, b2, norm, self._spec(rows).dumps())
        shape = (self.devices, rows, width)
        parts = spmd.disable_manual_sharding(part[None], (self.axis, None, None), shape, mesh=self.mesh).global_tensor
        total = parts.sum(0)
        return total if rows == tokens else total[:tokens]

    def _spec(self, rows: int) -> Spec:
        return choose(self.base, self.form, chip(), rows, self.config.top_k, self.config.expert_hidden_size)
