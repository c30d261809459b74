"""What DeepSeek's published load balancer does with one layer, restated from its description: its balance is the bar.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.4, and the repository deepseek-ai/EPLB. Every rank gets equally many
experts; copies go to the expert whose copies carry most, and are packed heaviest first onto the least loaded rank
that has room. With groups that the hosts divide, groups are packed onto hosts first, in the same way.
"""

from __future__ import annotations


def _pack(weights: list[float], bins: int) -> list[list[int]]:
    room = len(weights) // bins
    assert room * bins == len(weights)
    held: list[list[int]] = [[] for _ in range(bins)]
    if room == 1:
        return [[index] for index in range(bins)]
    loads = [0.0] * bins
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        best = min((b for b in range(bins) if len(held[b]) < room), key=loads.__getitem__)
        held[best].append(index)
        loads[best] += weights[index]
    return held


def _replicate(weights: list[float], physical: int) -> list[int]:
    counts = [1] * len(weights)
    for _ in range(physical - len(weights)):
        hot = max(range(len(weights)), key=lambda i: weights[i] / counts[i])
        counts[hot] += 1
    return counts


def published_imbalance(load: list[float], physical: int, ranks: int, hosts: int = 1, groups: int = 1) -> float:
    """Busiest rank over the mean."""
    if groups % hosts:
        hosts = groups = 1
    size = len(load) // groups
    packed = _pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], hosts)
    loads = []
    for chosen in packed:
        mine = [load[e] for g in chosen for e in range(g * size, (g + 1) * size)]
        counts = _replicate(mine, physical // hosts)
        copies = [mine[i] / counts[i] for i in range(len(mine)) for _ in range(counts[i])]
        loads += [sum(copies[i] for i in held) for held in _pack(copies, ranks // hosts)]
    return max(loads) / (sum(loads) / len(loads))
