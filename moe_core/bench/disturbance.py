"""Other work on the same cores, or on the same memory: how much there was, and waiting until there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

QUIET_CORES: Final = 0.15
"""Up to so many cores busy with other work count as quiet."""
CALM: Final = 0.25
"""Up to such a scatter times and reads count as undisturbed."""
ATTEMPTS: Final = 3
"""Of a cell: times of some calls scatter by themselves."""
_LOOK_SECONDS: Final = 0.5
_TICKS_PER_SECOND: Final = 100  # of /proc/stat, on every Linux that people run


class OtherWork:
    """Cores that are busy with neither this process nor its workers, from now on.

    Args:
        workers: processor seconds so far of each process that belongs to us.
    """

    def __init__(self, workers: Iterable[Callable[[], float]] = ()) -> None:
        self._workers = list(workers)
        self._begun = self._read()

    def _read(self) -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat") as lines:
                ticks = [int(word) for word in lines.readline().split()[1:9]]
        except OSError:
            return None
        idle = ticks[3] + ticks[4]
        own = time.process_time() + sum(seconds() for seconds in self._workers)
        return time.monotonic(), (sum(ticks) - idle) / _TICKS_PER_SECOND, own

    def cores(self) -> float | None:
        """Their mean number since the start; None where the system does not say."""
        begun, now = self._begun, self._read()
        if begun is None or now is None or now[0] <= begun[0]:
            return None
        return round(max(now[1] - begun[1] - (now[2] - begun[2]), 0.0) / (now[0] - begun[0]), 2)


def wait_for_quiet(at_most: float, tell: Callable[[str], None]) -> float:
    """Wait while other work is busy, at most so many seconds; returns how long it was."""
    started = time.monotonic()
    while time.monotonic() - started < at_most:
        look = OtherWork()
        time.sleep(_LOOK_SECONDS)
        busy = look.cores()
        if busy is None or busy <= QUIET_CORES:
            break
        tell(f"waiting: {busy:.1f} cores are busy with other work")
    return time.monotonic() - started


def scatter(cell: Mapping[str, Any]) -> float:
    """How far the measurements behind a cell's ratios lie apart.

    Of the times, moe_core's or the best peer's, half of p10 to p90 over the median, in the mode where it is least; of
    the reads that its rounds began with, the fastest less the slowest over the fastest; the larger of both. Guests of
    one machine share its memory, which no count of busy cores shows.
    """
    reads = cell.get("read", {}).get("rounds", ())
    apart = 1 - min(reads) / max(reads) if reads else 0.0
    found = math.inf
    for mode, best in cell["best_peer"].items():
        decide = [r for r in cell["results"] if r["kind"] == "moe_core" or r["name"] == best["name"]]
        times = [r["times"][mode] for r in decide if mode in r.get("times", {})]
        found = min(found, max((t["p90"] - t["p10"]) / (2 * t["median"]) for t in times))
    return max(found, apart) if cell["best_peer"] else apart
