"""How a layer is spread over ranks: what the caller says (:class:`Parallel`), and this rank's view (:class:`Ranks`)."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from ..config import MoEConfig
from ..errors import ConfigError, InputError
from ..reduction import ParallelFacts
from ..weights import MoEWeights
from .comm import TIMEOUT, Alone, Comm, ProcessComm
from .placement import Placement, Places, split_points
from .simulate import SimulatedMesh

AXES = ("dp", "ep", "tp")
"""Names that a mesh's dimensions may have."""

Dispatch = Literal["auto", "all_to_all", "all_gather", "direct"]


@dataclass(frozen=True)
class Parallel:
    """A mesh and how a layer uses it; ``MoERunner(mesh=)`` takes this, or the mesh alone with these defaults.

    Args:
        mesh: a DeviceMesh whose dimensions are named "dp" (replicas, which exchange nothing), "ep" (ranks hold
            different experts) and "tp" (ranks split the intermediate size of each expert), in any order and number; or
            a rank of :func:`simulate`.
        placement: which rank of "ep" holds which experts; None is consecutive ones, as equal as possible.
        tokens: ``own``: each rank of "ep" brings its own tokens, any number of them, and gets their rows back.
            ``replicated``: all bring the same tokens, as behind tensor-parallel attention (expert parallel inside
            tensor parallel): nothing is dispatched, and a sum over "ep" is part of the reduction.
        sequence_parallel: ranks of "tp" bring different rows of a sequence and get theirs back; otherwise all of them
            bring the same.
        dispatch: ``all_to_all`` sends a row once to each rank that holds one of its experts; ``all_gather`` (the naive
            one) brings all rows to all ranks and waits for no device; ``direct`` does the same by copies between the
            memories of one host's devices, which take no multiprocessors from the experts. ``auto``: where a token
            reaches most ranks ``direct``, or ``all_gather`` if they share no memory, and ``all_to_all`` elsewhere.
        shared_axes: axes that split the shared experts' intermediate size; None splits them as the routed ones are, but
            keeps a function of the caller's, whose result is taken to be complete, and replicates them under sequence
            parallelism.
        timeout: seconds that a rank waits for the others.

    Raises:
        InputError: a value that is none of these, or a mesh without names.
    """

    mesh: Any
    placement: Placement | None = None
    tokens: Literal["own", "replicated"] = "own"
    sequence_parallel: bool = False
    dispatch: Dispatch = "auto"
    shared_axes: tuple[str, ...] | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        for field, known in (("tokens", ("own", "replicated")), ("dispatch", Dispatch.__args__)):  # type: ignore[attr-defined]
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"Parallel.{field}={value!r}: expected one of {', '.join(known)}")
        if not self.timeout > 0:
            raise InputError(f"Parallel.timeout={self.timeout!r}: expected seconds above 0")

    @classmethod
    def of(cls, mesh: Any) -> Parallel:
        """``mesh`` itself, or the defaults for one."""
        return mesh if isinstance(mesh, cls) else cls(mesh)

    def comms(self) -> dict[str, Comm]:
        """The axes of the mesh by name; those that it lacks have one rank.

        Raises:
            InputError: names that are missing or unknown.
        """
        mesh = self.mesh
        if isinstance(mesh, SimulatedMesh):
            found: dict[str, Comm] = dict(mesh.comms)
        else:
            names = getattr(mesh, "mesh_dim_names", None)
            if not names:
                raise InputError(
                    f"mesh={mesh!r}: expected a DeviceMesh with named dimensions; make it with "
                    f"init_device_mesh(device_type, sizes, mesh_dim_names=(...)) and names of {', '.join(AXES)}"
                )
            self._check_names(names)
            found = {name: ProcessComm(mesh.get_group(name), name, self.timeout) for name in names}
        self._check_names(found)
        return {axis: found.get(axis) or Alone(axis) for axis in AXES}

    @staticmethod
    def _check_names(names: Any) -> None:
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise InputError(
                f"mesh dimension {unknown[0]!r}: expected names of {', '.join(AXES)}; take the part of the mesh that "
                f"the layer is spread over, such as mesh['ep']"
            )


@dataclass(frozen=True)
class Ranks:
    """One rank's view of a layer that is spread over a mesh: settled at bind, the same for all its bindings.

    Args:
        config: of the whole layer.
        options: what the caller said.
        comms: the axes by name.
        placement: experts on the ranks of "ep".
        facts: for the plan of sums.
        separate_shared: whether shared experts run beside the routed ones.
        device: of the weights.
    """

    config: MoEConfig
    options: Parallel
    comms: dict[str, Comm]
    placement: Placement
    facts: ParallelFacts
    separate_shared: bool
    device: torch.device

    @classmethod
    def of(cls, mesh: Any, config: MoEConfig, weights: MoEWeights, shared_by_caller: bool) -> Ranks:
        """Settle everything for one layer, and agree on it with the other ranks.

        Args:
            shared_by_caller: the shared experts are a function of the caller's.
        Raises:
            ConfigError: a layer that cannot be spread so.
            ParallelError: ranks that hold parts of different layers, or one that does not answer.
        """
        from .agree import check_agreement

        ranks = cls.settle(Parallel.of(mesh), config, weights.device, shared_by_caller)
        check_agreement(ranks, weights.dtype)
        return ranks

    @classmethod
    def settle(
        cls,
        options: Parallel,
        config: MoEConfig,
        device: torch.device | None = None,
        shared_by_caller: bool = False,
    ) -> Ranks:
        """As :meth:`of`, without a word to the other ranks."""
        comms = options.comms()
        ep, tp = comms["ep"].size, comms["tp"].size
        placement = options.placement or Placement.linear(config.num_experts, ep)
        if placement.ranks != ep or placement.num_experts != config.num_experts:
            raise ConfigError(
                f"placement of {placement.num_experts} experts on {placement.ranks} ranks: expected "
                f"{config.num_experts} experts on {ep}, the layer's and the size of axis 'ep'"
            )
        _check_split(config, tp)
        sp = tp if options.sequence_parallel else 1
        if sp > 1 and not config.reduce_results:
            raise ConfigError(
                f"reduce_results=False: expected True under sequence parallelism of {sp} ranks, whose results are sums "
                f"over the ranks of rows that only one of them gets back"
            )
        own = options.tokens == "own"
        facts = ParallelFacts(tp, ep, sp, combine_sums=own, shared_axes=_shared_axes(options, config, comms, sp))
        if shared_by_caller and options.shared_axes is None:
            facts = dataclasses.replace(facts, shared_axes=())
        separate = config.has_shared_experts or shared_by_caller
        return cls(config, options, comms, placement, facts, separate, device or torch.device("cpu"))

    def bind(self, *arguments: Any, **options: Any) -> Any:
        """A :class:`ParallelBinding`."""
        from .binding import ParallelBinding

        return ParallelBinding(*arguments, ranks=self, **options)

    @property
    def dispatches(self) -> bool:
        """Whether tokens travel to the ranks of their experts."""
        return self.comms["ep"].size > 1 and self.options.tokens == "own"

    @property
    def sequence_parallel(self) -> bool:
        """Whether rows are gathered over "tp" first."""
        return self.facts.sp_size > 1

    @cached_property
    def places(self) -> Places:
        """Global ids to places."""
        return Places(self.placement, self.config.zero_expert_num, self.device)

    @cached_property
    def exchange(self) -> Any:
        """How tokens travel: the default of moe_dispatch and moe_combine."""
        from .exchange import choose

        return choose(self)

    def zero_experts_here(self) -> bool:
        """Whether zero experts of tokens that all partial ranks see are added by this one."""
        axes = ("tp",) if self.dispatches else ("tp", "ep")
        return all(self.comms[axis].rank == 0 for axis in axes)

    def shared_part(self) -> tuple[int, int]:
        """This rank's number among those that split the shared experts, and how many there are."""
        index, parts = 0, 1
        for axis in self.facts.shared_axes:
            index, parts = index * self.comms[axis].size + self.comms[axis].rank, parts * self.comms[axis].size
        return index, parts

    def local_config(self, config: MoEConfig) -> MoEConfig:
        """The config of the part that this rank holds."""
        tp = self.comms["tp"]
        bounds = split_points(config.intermediate_size, tp.size)
        shared = config.shared_intermediate_size
        if shared is not None:
            index, parts = self.shared_part()
            cut = split_points(shared, parts)
            shared = cut[index + 1] - cut[index]
        threshold = config.shared_experts_stream_token_threshold
        if self.dispatches and not self.exchange.leaves_early:
            threshold = sys.maxsize  # whatever their number, tokens on their way leave the device idle
        return dataclasses.replace(
            config,
            shared_experts_stream_token_threshold=threshold,
            intermediate_size=bounds[tp.rank + 1] - bounds[tp.rank],
            num_local_experts=len(self.placement.slots[self.comms["ep"].rank]),
            shared_intermediate_size=shared,
            max_chunk_tokens=None,
            max_chunk_bytes=None,
        )

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis}={comm.size}" for axis, comm in self.comms.items() if comm.size > 1)
        return f"Ranks({sizes or 'one'})"


def _check_split(config: MoEConfig, tp: int) -> None:
    if tp == 1:
        return
    if config.intermediate_size < tp:
        raise ConfigError(
            f"intermediate_size={config.intermediate_size}: expected at least {tp}, the size of axis 'tp'"
        )
    if config.post_expert_norm_eps is not None:
        raise ConfigError(
            f"post_expert_norm_eps={config.post_expert_norm_eps}: expected None on axis 'tp' of {tp} ranks, because "
            f"the norm needs an expert's whole output and a rank has a part; spread the experts over 'ep'"
        )
    if config.quant is not None:
        raise ConfigError(
            f"quant={config.quant.scheme!r}: expected None on axis 'tp' of {tp} ranks, because packed weights and "
            f"their scales are not cut; spread the experts over 'ep'"
        )


def _shared_axes(options: Parallel, config: MoEConfig, comms: dict[str, Comm], sp: int) -> tuple[str, ...]:
    if options.shared_axes is not None:
        return tuple(axis for axis in options.shared_axes if comms[axis].size > 1)
    inner = config.shared_intermediate_size
    if inner is None or sp > 1 or config.quant is not None:
        return ()
    axes = tuple(
        axis for axis in ("tp", "ep") if comms[axis].size > 1 and (axis == "tp" or options.tokens == "replicated")
    )
    ranks = 1
    for axis in axes:
        ranks *= comms[axis].size
    return axes if inner >= ranks else ()
