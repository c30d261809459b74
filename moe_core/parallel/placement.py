"""Which rank holds which experts: any number on each, an expert on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Experts of one layer on the ranks of axis "ep".

    Args:
        num_experts: E, the global number.
        slots: for each rank the global ids of its experts, in the order of their local ids.

    Raises:
        ConfigError: an expert that nobody holds, an id out of range, or one twice on a rank.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(tuple(int(e) for e in held) for held in self.slots))
        for rank, held in enumerate(self.slots):
            bad = [e for e in held if not 0 <= e < self.num_experts]
            if bad:
                raise ConfigError(
                    f"placement: rank {rank} holds expert {bad[0]}, expected 0 to num_experts - 1 = "
                    f"{self.num_experts - 1}; plan it for this layer"
                )
            if len(set(held)) < len(held):
                twice = next(e for e in held if held.count(e) > 1)
                raise ConfigError(
                    f"placement: rank {rank} holds expert {twice} twice, expected once; a copy beside itself only costs"
                )
        missing = sorted(set(range(self.num_experts)).difference(*self.slots))
        if missing:
            raise ConfigError(
                f"placement: no rank holds {f'expert {missing[0]}' if len(missing) == 1 else f'experts {missing}'}, "
                f"expected each of {self.num_experts} on at least one; tokens that chose it would lose it"
            )

    @classmethod
    def linear(cls, num_experts: int, ranks: int) -> Placement:
        """Consecutive experts, as equal as possible: the first ranks hold one more where they don't divide."""
        bounds = split_points(num_experts, ranks)
        return cls(num_experts, tuple(tuple(range(a, b)) for a, b in pairwise(bounds)))

    @classmethod
    def round_robin(cls, num_experts: int, ranks: int) -> Placement:
        """Expert e on rank e modulo ranks."""
        return cls(num_experts, tuple(tuple(range(rank, num_experts, ranks)) for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        """How many ranks it is for."""
        return len(self.slots)

    @property
    def num_physical_experts(self) -> int:
        """Experts held by all ranks together, copies counted."""
        return sum(map(len, self.slots))

    @property
    def num_redundant_experts(self) -> int:
        """Copies beyond the first."""
        return self.num_physical_experts - self.num_experts

    @cached_property
    def width(self) -> int:
        """Most experts on one rank."""
        return max(1, *map(len, self.slots))

    def expert_map(self, rank: int) -> Tensor:
        """int32 [num_experts]: the local id on that rank, -1 where it has none."""
        found = torch.full((self.num_experts,), -1, dtype=torch.int32)
        held = torch.tensor(self.slots[rank], dtype=torch.int64)
        found[held] = torch.arange(len(held), dtype=torch.int32)
        return found

    def copies(self) -> list[list[int]]:
        """For each expert its places, ``rank * width + local id``, by rank."""
        places: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, held in enumerate(self.slots):
            for slot, expert in enumerate(held):
                places[expert].append(rank * self.width + slot)
        return places


def split_points(size: int, parts: int) -> list[int]:
    """[parts + 1] bounds of consecutive parts of ``size``, as equal as possible, the larger ones first."""
    each, more = divmod(size, parts)
    return [part * each + min(part, more) for part in range(parts + 1)]


class Places:
    """Global ids to places, on a device: which of an expert's copies serves a row is settled by the row's number.

    A place is ``rank * width + local id``; -1 is no expert, and from ``end`` on are the zero experts.

    Args:
        zero_experts: how many ids behind ``num_experts`` are experts without weights.
        device: of the ids.
    """

    def __init__(self, placement: Placement, zero_experts: int, device: torch.device) -> None:
        self.placement, self.zero_experts = placement, zero_experts
        self.width, self.end = placement.width, placement.ranks * placement.width
        copies = placement.copies()
        most = max(map(len, copies))
        # Behind the last id one that is too large, and one for -1, which indexes from the back.
        rows = [[at[c % len(at)] for c in range(most)] for at in copies]
        rows += [[self.end + z] * most for z in range(zero_experts)] + [[-1] * most] * 2
        self._limit = placement.num_experts + zero_experts
        # Consecutive experts, the same number on each rank: an id is its place, and one that is too large is nobody's.
        self._same = not zero_experts and copies == [[expert] for expert in range(placement.num_experts)]
        self._table = torch.tensor(rows, dtype=torch.int32, device=device)
        self._first = self._table[:, 0].contiguous()
        self._nobody = torch.tensor(-1, dtype=torch.int32, device=device)
        counts = [len(at) for at in copies] + [1] * (zero_experts + 2)
        self._counts = torch.tensor(counts, dtype=torch.int32, device=device) if most > 1 else None

    def of(self, topk_ids: Tensor, shift: int = 0) -> Tensor:
        """Places [T, K] int32 of global ids [T, K].

        Args:
            shift: row t takes copy (t + shift) modulo their number, so that ranks do not all begin with the first.
        """
        if self._same:
            return topk_ids.to(torch.int32)
        ids = topk_ids.clamp(-1, self._limit)
        if self._counts is None:
            return self._first[ids]
        rows = torch.arange(shift, shift + ids.shape[0], dtype=torch.int32, device=ids.device)
        return self._table[ids, rows[:, None] % self._counts[ids]]

    def local(self, places: Tensor, rank: int, own: bool | Tensor) -> Tensor:
        """Local ids int32 on ``rank``: -1 for experts of other ranks.

        Args:
            own: whether zero experts are served here: on exactly one rank, or their share would be added by each.
        """
        # As few operations as do it: each is a kernel in front of the experts, and so is a number that is no tensor.
        first = rank * self.width
        local = places - first if first else places
        ids = torch.where(local < self.width, local, self._nobody).clamp_(min=-1)
        if self.zero_experts:
            zero = places - self.end
            ids = torch.where((zero >= 0) & own, zero + self.placement.num_experts, ids)
        return ids
