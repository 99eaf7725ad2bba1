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
_SHARED_BYTES = 46_000  # of a block, without asking for more
WARPS_WANTED = 2048  # of a launch: 132 multiprocessors with 16 each hide a fetch's latency


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
    sums in registers. Of the layouts with enough warps at work it is the one with the widest slabs, since
    every slab prepares all spikes; of those the one with the smallest cluster.
    """
    padded = 1 << (batch - 1).bit_length()
    columns = 8 // bits
    widths = (16, 8, 4, 1) if aligned else (1,)
    most = _SUMS_TWICE if floats or bits == 4 else _SUMS
    vec = next(v for v in widths if row % v == 0 and v * columns * padded <= most)
    runs = -(-inputs // RUN)

    def layouts() -> Iterator[Plan]:
        for lanes in (32, 16, 8):
            slabs = -(-row // (lanes * vec))
            for cluster in (1, 2, 4, 8):
                for warps in (8, 16, 4):
                    words = (warps + 1) * padded * lanes * vec * columns + warps * (padded + 1) * 8
                    fits = 4 * words <= _SHARED_BYTES and (warps < 16 or vec * columns * padded <= 32)
                    busy = cluster * warps < max(8, 2 * runs)  # half of them at least
                    if fits and busy and cluster <= largest:
                        yield Plan(padded, vec, lanes, warps, cluster, slabs)

    def at_work(p: Plan) -> int:
        return p.slabs * min(runs, p.cluster * p.warps)

    found = list(layouts())
    enough = [p for p in found if at_work(p) >= WARPS_WANTED]
    return enough[0] if enough else max(found, key=at_work)
