"""What a GPU did during a step: shares of computing, communication and waiting, from a profiler's kernels."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Kernel", "kernel_shares", "kernels_of"]

# The first that a kernel's name matches. Those of NCCL wait for other GPUs too.
KINDS = {
    "communication": r"nccl",
    "scan": r"chunk_(?:scan|state|cumsum)|_bmm_chunk|state_passing",
    "compiled (norms, gates, neurons, convolution, loss)": r"^triton_",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|sm\d\d_|splitK",
    "optimiser and clipping": r"adam|multi_tensor|foreach",
    "copies and fills": r"mem(?:cpy|set)|copy|fill|split_with_sizes|chunk_cat|direct_copy",
}
OTHER = "other"
# Marks of a profile on the GPU's line that are no work of it.
MARKS = re.compile(
    r"(?:FSDP|nccl|DistributedDataParallel|Optimizer|ProfilerStep|## )[:#. ]|(?:Context|Event|Stream) \w+"
)


class Kernel(NamedTuple):
    """One kernel, copy or fill on a GPU; start and end in seconds of one clock."""

    name: str
    start: float
    end: float


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kind_of(name: str) -> str:
    return next((kind for kind, known in KINDS.items() if re.search(known, name, re.IGNORECASE)), OTHER)


def kernel_shares(kernels: Sequence[Kernel], seconds: float) -> dict[str, float | dict[str, float]]:
    """Shares of a step of ``seconds``.

    Returns:
        ``computing``: at least one kernel that is not communication runs; ``exposed_communication``: nothing
        but communication; ``idle``: nothing; these sum to 1. ``hidden_communication``: communication while
        something computes. ``kinds``: the sum of durations by kind, over the step; kernels that run at the
        same time count twice there. ``kernels``: how many there were.
    """
    computing = [(k.start, k.end) for k in kernels if kind_of(k.name) != "communication"]
    talking = [(k.start, k.end) for k in kernels if kind_of(k.name) == "communication"]
    busy, computed, talked = _covered(computing + talking), _covered(computing), _covered(talking)
    kinds: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel.name)
        kinds[kind] = kinds.get(kind, 0.0) + (kernel.end - kernel.start) / seconds
    return {
        "seconds": seconds,
        "computing": computed / seconds,
        "exposed_communication": (busy - computed) / seconds,
        "hidden_communication": (talked - (busy - computed)) / seconds,
        "idle": 1.0 - busy / seconds,
        "kernels": len(kernels),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
    }


def kernels_of(events: Iterable) -> list[Kernel]:
    """The kernels, copies and fills among the events of ``torch.profiler.profile``."""
    return [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation and not MARKS.match(event.name)
    ]
