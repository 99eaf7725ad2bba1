"""How an event-driven product is laid over threads, blocks and clusters of blocks; see ``gather.cuh``."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = ["CLUSTER", "RUN", "Plan", "clusters", "plan"]

RUN = 32  # inputs that a warp takes at a time; those that share a scale of 4-bit weights
CLUSTER = 8  # blocks of a cluster, at most: what every GPU with clusters can do
# A lane's sums, its columns times its rows of spikes, which lie in registers; and where each run of inputs
# has sums of its own beside them, as 4-bit weights do.
_SUMS, _SUMS_TWICE = 64, 32
_COLUMNS = 16  # a lane's, at most: the rows under way want registers too
_SHARED_BYTES = 46_000  # of a block, without asking for more
WARPS_WANTED = 1056  # of a launch: 132 multiprocessors with 8 each
# Of one row of rounded activations: at 1.3B 64 blocks for out_proj make a token in 0.91 of the time of 128.
_WARPS_WANTED_FLOATS = 1024


class Plan(NamedTuple):
    """A layout.

    Attributes:
        batch: rows of spikes that are compiled in, 1, 2, 4 or 8.
        vec, lanes, warps, cluster: as in ``gather.cuh``.
        slabs: clusters, each with columns of its own.
    """

    batch: int
    vec: int
    lanes: int
    warps: int
    cluster: int
    slabs: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along both axes."""
        return self.slabs, self.cluster

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps


def clusters(device: torch.device) -> int:
    """The largest cluster of blocks that a device can have; 1 where it has none."""
    if device.type != "cuda":
        return CLUSTER
    return CLUSTER if torch.cuda.get_device_capability(device) >= (9, 0) else 1


@functools.lru_cache(maxsize=1024)
def plan(
    bits: int,
    batch: int,
    inputs: int,
    row: int,
    aligned: bool = True,
    largest: int = CLUSTER,
    floats: bool = False,
) -> Plan:
    """The layout for ``batch`` rows of spikes, ``inputs`` and rows of ``row`` bytes, ``aligned`` or not.

    ``floats`` is what it is in ``gather.cuh``. A lane reads the widest pieces that divide a row and leave its
    sums in registers; all warps take as many runs of inputs as one another, if they can. Of the layouts with
    enough warps at work it is the one with the widest slabs, whose rows lie in one piece; of those one with
    small blocks, and the smallest cluster.
    """
    padded = 1 << (batch - 1).bit_length()
    columns = 8 // bits
    widths = (16, 8, 4, 1) if aligned else (1,)
    most = _SUMS_TWICE if floats or bits == 4 else _SUMS
    vec = next(v for v in widths if row % v == 0 and v * columns <= min(_COLUMNS, most // padded))
    busiest = next(w for w, s in ((20, 16), (16, 32), (8, _SUMS)) if vec * columns * padded <= s)
    runs = max(1, -(-inputs // RUN))

    def layouts() -> Iterator[Plan]:
        for lanes in (32, 16, 8):
            slabs = -(-row // (lanes * vec))
            sums = padded * lanes * vec * columns  # of a warp
            fit = (_SHARED_BYTES // 4 - sums) // (sums + 8 * (padded + 1))
            for limit in (16, 20):  # the larger one where it spares a second round
                for cluster in (c for c in (1, 2, 4, 8) if c <= largest):
                    rounds = -(-runs // (cluster * min(fit, busiest, limit)))
                    yield Plan(padded, vec, lanes, -(-runs // (cluster * rounds)), cluster, slabs)

    def at_work(p: Plan) -> int:
        return p.slabs * min(runs, p.cluster * p.warps)

    found = list(layouts())
    wanted = min(WARPS_WANTED, _WARPS_WANTED_FLOATS) if floats and batch == 1 else WARPS_WANTED
    enough = [p for p in found if at_work(p) >= wanted]
    return enough[0] if enough else max(found, key=at_work)
