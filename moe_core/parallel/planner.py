"""Which expert goes on which rank, and of which there are several copies: from measured load, as a pure function.

Copies are given one by one to the expert whose copies carry the most; the copies are then packed, heaviest first, each
on the least loaded rank that has room and no copy of it, and pairs are exchanged as long as the busiest rank gains.
With groups of experts that a router prefers together, and ranks on several hosts, whole groups are packed on hosts
first, and the rest happens within each host. The first two steps are those of DeepSeek's published load balancer
(DeepSeek-V3, arXiv 2412.19437, section 3.4); the exchange is ours.
"""

from __future__ import annotations

import bisect
import heapq
import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError
from .placement import Placement, split_points

ROUNDS = 200
"""Exchanges at most; a layer of 256 experts needs a few dozen."""
PARTNERS = 12
"""Least loaded ranks that the busiest may exchange with."""
ATTEMPTS, SHAKE, NEAR = 3, 0.03, 0.003
"""Orders of packing that are tried, how far each is from the last, and how near to the bound the search ends."""
GAIN = 1e-4
"""Share of the busiest rank's load that an exchange has to take away."""
EVEN = 1.0005
"""Busiest over mean that needs no further exchange: measured load is never that exact."""


def plan_placement(
    load: Sequence[float] | Any, ranks: int, *, redundant: int = 0, hosts: int = 1, groups: int | None = None
) -> Placement:
    """Place the experts of one layer.

    Args:
        load: [E], how much each expert is used: tokens, as :meth:`MoERunner.recording` counts them. A tensor is read.
        ranks: of axis "ep", those of one host side by side.
        redundant: copies beyond one of each expert; a rank holds at most (E + redundant) / ranks, rounded up.
        hosts: that the ranks are on.
        groups: equal groups of consecutive experts (``config.num_expert_group``), each to be kept on one host; None, or
            a number that the hosts do not divide, places each expert by itself.
    Returns:
        Placement: ids ascending on each rank, the same for the same load.
    Raises:
        ConfigError: sizes that cannot be placed, or a load that is no number of at least 0.
    """
    weights = [float(value) for value in (load.tolist() if hasattr(load, "tolist") else load)]
    _check(weights, ranks, redundant, hosts, groups)
    physical = len(weights) + redundant
    if hosts == 1 or not groups or groups % hosts:
        return Placement(len(weights), _place(range(len(weights)), weights, ranks, physical))
    size = len(weights) // groups
    blocks = [range(group * size, (group + 1) * size) for group in range(groups)]
    heavy = [sum(weights[e] for e in block) for block in blocks]
    packed = _pack(list(enumerate(heavy)), hosts, groups // hosts)
    shares = split_points(physical, hosts)
    slots: list[tuple[int, ...]] = []
    for host, chosen in enumerate(packed):
        mine = [e for group in sorted(chosen) for e in blocks[group]]
        slots += _place(mine, weights, ranks // hosts, shares[host + 1] - shares[host])
    return Placement(len(weights), tuple(slots))


def imbalance(placement: Placement, load: Sequence[float] | Any) -> float:
    """The busiest rank's load over the mean, 1.0 at best, where copies share their expert's load evenly."""
    weights = [float(value) for value in (load.tolist() if hasattr(load, "tolist") else load)]
    counts = [len(places) for places in placement.copies()]
    loads = [sum(weights[e] / counts[e] for e in held) for held in placement.slots]
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def _check(weights: list[float], ranks: int, redundant: int, hosts: int, groups: int | None) -> None:
    experts = len(weights)
    bad = [value for value in weights if not 0 <= value < float("inf")]
    if bad or not experts:
        raise ConfigError(f"load: {bad[:1] or 'no experts'}, expected a number of at least 0 for each expert")
    if ranks < 1 or hosts < 1 or ranks % hosts:
        raise ConfigError(f"ranks={ranks}, hosts={hosts}: expected at least 1 of both, as many ranks on each host")
    if not 0 <= redundant <= experts * (ranks - 1):
        raise ConfigError(
            f"redundant={redundant}: expected 0 to {experts * (ranks - 1)}; a rank holds an expert at most once"
        )
    if groups is not None and (groups < 1 or experts % groups):
        raise ConfigError(f"groups={groups}: expected a divisor of {experts} experts")


def _place(experts: Iterable[int], weights: list[float], ranks: int, physical: int) -> tuple[tuple[int, ...], ...]:
    """Copies of these experts, ``physical`` in all, on ``ranks`` ranks."""
    mine = list(experts)
    counts = dict.fromkeys(mine, 1)
    # Of equals the one with most copies first: one more of it lightens the most ranks.
    heap = [(-weights[e], -1, e) for e in mine]
    heapq.heapify(heap)
    for _ in range(min(physical, len(mine) * ranks) - len(mine)):
        *_, expert = heapq.heappop(heap)
        counts[expert] += 1
        if counts[expert] < ranks:
            heapq.heappush(heap, (-weights[expert] / counts[expert], -counts[expert], expert))
    copies = [(e, weights[e] / counts[e]) for e in mine for _ in range(counts[e])]
    packed = _pack(copies, ranks, -(-len(copies) // ranks))
    return tuple(tuple(sorted(held)) for held in packed)


def _pack(items: list[tuple[int, float]], bins: int, room: int) -> list[list[int]]:
    """Items (name, weight) into bins of ``room`` places, no name twice in one; the best of a few orders."""
    bound = max(max(weight for _, weight in items), sum(weight for _, weight in items) / bins)
    best: tuple[float, list[list[int]]] | None = None
    for attempt in range(ATTEMPTS):
        # First heaviest first, then orders that are nearly that: where copies are few, one of them packs better.
        shake = random.Random(attempt)
        keyed = [(-weight * (1 + SHAKE * attempt * shake.random()), name, weight) for name, weight in items]
        loads, held = _greedy([(name, weight) for _, name, weight in sorted(keyed)], bins, room)
        _exchange(held, loads, room)
        if best is None or max(loads) < best[0]:
            best = (max(loads), [list(names) for names in held])
        if best[0] <= bound * (1 + NEAR):
            break
    assert best is not None
    return best[1]


def _greedy(items: list[tuple[int, float]], bins: int, room: int) -> tuple[list[float], list[dict[int, float]]]:
    """Each item in the least loaded bin that has room and not this name."""
    loads, held = [0.0] * bins, [dict[int, float]() for _ in range(bins)]
    for name, weight in items:
        free = [b for b in range(bins) if len(held[b]) < room and name not in held[b]]
        if not free:
            _make_room(name, weight, held, loads, room)
            continue
        best = min(free, key=lambda b: (loads[b], b))
        held[best][name] = weight
        loads[best] += weight
    return loads, held


def _make_room(name: int, weight: float, held: list[dict[int, float]], loads: list[float], room: int) -> None:
    """Every bin with room has the item already: one of them takes another bin's item, which it lacks, instead."""
    target = next(b for b in range(len(held)) if len(held[b]) < room)
    for source in sorted(range(len(held)), key=lambda b: loads[b]):
        if name in held[source]:
            continue
        moved = min((n for n in held[source] if n not in held[target]), key=lambda n: held[source][n], default=None)
        if moved is not None:
            amount = held[source].pop(moved)
            held[target][moved] = amount
            held[source][name] = weight
            loads[target] += amount
            loads[source] += weight - amount
            return
    raise ConfigError(f"expert {name}: no rank without a copy of it has room; ask for fewer redundant experts")


def _exchange(held: list[dict[int, float]], loads: list[float], room: int) -> None:
    """Give or swap items of the busiest bin as long as both it and its partner end below what it had."""
    enough = EVEN * sum(loads) / len(loads)
    for _ in range(ROUNDS):
        order = sorted(range(len(loads)), key=loads.__getitem__)
        busiest = order[-1]
        if loads[busiest] <= enough:
            return
        found = _best_step(held, loads, room, busiest, order[:PARTNERS]) or _best_step(
            held, loads, room, busiest, order[PARTNERS:-1]
        )
        if found is None:
            return
        other, name, partner = found
        step = held[busiest][name] - (held[other][partner] if partner is not None else 0.0)
        held[other][name] = held[busiest].pop(name)
        if partner is not None:
            held[busiest][partner] = held[other].pop(partner)
        loads[busiest] -= step
        loads[other] += step


def _best_step(
    held: list[dict[int, float]], loads: list[float], room: int, busiest: int, others: list[int]
) -> tuple[int, int, int | None] | None:
    """(other bin, item that goes there, item that comes back) by which the larger of both becomes smallest."""
    best: tuple[float, int, int, int | None] = (loads[busiest] * (1 - GAIN), -1, -1, None)
    for other in others:
        gap = loads[busiest] - loads[other]
        if other == busiest or gap <= 0:
            continue
        theirs = sorted((weight, name) for name, weight in held[other].items() if name not in held[busiest])
        for name, weight in held[busiest].items():
            if name in held[other]:
                continue
            for step, partner in _partners(theirs, weight, gap / 2, len(held[other]) < room):
                larger = max(loads[busiest] - step, loads[other] + step)
                if step > 0 and larger < best[0]:
                    best = (larger, other, name, partner)
    return best[1:] if best[1] >= 0 else None


def _partners(
    theirs: list[tuple[float, int]], weight: float, wanted: float, has_room: bool
) -> Iterable[tuple[float, int | None]]:
    """What to take for an item, so that nearly ``wanted`` moves: the two nearest, and nothing where there is room."""
    at = bisect.bisect_left(theirs, (weight - wanted, -1))
    for index in (at - 1, at):
        if 0 <= index < len(theirs):
            yield weight - theirs[index][0], theirs[index][1]
    if has_room:
        yield weight, None
