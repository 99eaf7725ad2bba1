"""mamba-ssm's Triton kernels on the CPU, in a process of its own: ``triton_process.py RESULTS``.

The process needs Triton, einops and mamba-ssm on its path and ``TRITON_INTERPRET=1``. It computes every
case of CASES by the kernels and writes the results; whoever imports this module computes them by torch.
"""

import math
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from spiking_mamba.model import scan as ssd

BATCH, HEADS, STATE, CHUNK = 2, 2, 16, 16
NO_LIMIT = (0.0, math.inf)
LIMIT = (0.3, 1.0)  # cuts most of the steps drawn below, on both sides


@dataclass(frozen=True)
class Case:
    """What to compute: "scan", "operator" (the scan under torch.compile) or "update" (one token)."""

    kind: str
    dtype: torch.dtype
    length: int = 1
    groups: int = 1
    head_dim: int = 16
    initial: bool = False
    limit: tuple[float, float] = NO_LIMIT
    documents: bool = False  # three in a row
    padded: bool = False  # the last two places

    def __str__(self) -> str:
        words = [self.kind, str(self.dtype).removeprefix("torch."), f"length{self.length}"]
        words += [f"groups{self.groups}", f"head{self.head_dim}"]
        words += ["initial"] * self.initial + ["limit"] * (self.limit != NO_LIMIT)
        words += ["documents"] * self.documents + ["padded"] * self.padded
        return "-".join(words)


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1, 7, 16, 33):
            yield Case("scan", dtype, length)
            yield Case("scan", dtype, length, groups=2, initial=True)
        yield Case("scan", dtype, 33, head_dim=8, initial=True, limit=LIMIT)
        yield Case("scan", dtype, 33, initial=True, documents=True)
        yield Case("scan", dtype, 33, groups=2, initial=True, documents=True, padded=True)
        yield Case("scan", dtype, 16, padded=True, limit=LIMIT)
        yield Case("operator", dtype, 33, documents=True)
        yield Case("operator", dtype, 7, head_dim=8)
        yield Case("operator", dtype, 33, groups=2, limit=LIMIT)
        for limit in (NO_LIMIT, LIMIT):
            yield Case("update", dtype, head_dim=8, limit=limit)
            yield Case("update", dtype, groups=2, limit=limit)


CASES = list(_cases())


def compute(case: Case) -> dict[str, torch.Tensor]:
    """Outputs, last states and, for a scan, the gradient to each input, by name."""
    generator = torch.Generator().manual_seed(case.length)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    token = (BATCH,) if case.kind == "update" else (BATCH, case.length)
    inputs = {
        "x": draw(*token, HEADS, case.head_dim, dtype=case.dtype),
        "dt": draw(*token, HEADS, dtype=case.dtype),
        "A": -draw(HEADS).exp(),
        "B": draw(*token, case.groups, STATE, dtype=case.dtype),
        "C": draw(*token, case.groups, STATE, dtype=case.dtype),
        "D": draw(HEADS),
        "dt_bias": draw(HEADS) - 0.5,
    }
    state = draw(BATCH, HEADS, case.head_dim, STATE)
    # A step on the limit has a gradient or none, as it is rounded: bfloat16 must not decide that.
    step = F.softplus(inputs["dt"] + inputs["dt_bias"])
    inputs["dt"] += 0.5 * sum((step / edge - 1).abs() < 0.1 for edge in case.limit)
    if case.kind == "update":
        with torch.no_grad():
            y = ssd.state_update(state, **inputs, dt_limit=case.limit)
        return {"y": y, "state": state}
    if case.initial:
        inputs["initial_states"] = state
    for tensor in inputs.values():
        tensor.requires_grad_()
    document = real = None
    if case.documents:
        places = torch.arange(case.length) * 3 // case.length
        document = places.int().expand(BATCH, -1).contiguous()
    if case.padded:
        real = (torch.arange(case.length) < case.length - 2).expand(BATCH, -1)
    where = {"document": document, "real": real}
    if case.kind == "operator":
        if ssd._on_triton(inputs["x"]):
            outputs = {"y": ssd._scan_operator(*inputs.values(), document, CHUNK, *case.limit)}
        else:
            outputs = {"y": ssd.chunk_scan(**inputs, **where, chunk_size=CHUNK, dt_limit=case.limit)}
    else:
        options = {"chunk_size": CHUNK, "dt_limit": case.limit, "return_final_states": True}
        y, last = ssd.chunk_scan(**inputs, **where, **options)
        if real is not None:  # what comes out at padding means nothing
            y = y * real[..., None, None]
        outputs = {"y": y, "state": last}
    # Of squares, gradients to A and dt_bias are sums of terms that hardly cancel.
    loss = sum(output.float().square().sum() for output in outputs.values())
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    outputs = {name: output.detach() for name, output in outputs.items()}
    return outputs | {f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}


def use_the_interpreter() -> None:
    """Let :mod:`spiking_mamba.model.scan` take Triton's kernels, and these run without a GPU."""
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import (
        InterpreterBuilder,
        InterpreterOptions,
        TensorHandle,
        interpreter_builder,
    )

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(builder, source, dtype):
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            rounded = torch.tensor(source.data).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        if dtype.scalar == tl.float32:
            source = widened(source)
        return interpreters_cast(builder, source, dtype)

    def dot(builder, a, b, *others):
        return interpreters_dot(builder, widened(a), widened(b), *others)

    # The interpreter keeps bfloat16 as its bits: it multiplies those, and truncates where a GPU rounds.
    interpreters_cast, interpreters_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    # Checks of every sum of integers, which a GPU does not make either, take half of the time.
    interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
    # There is nothing to time: of a kernel's configurations the one of the smallest blocks is taken.
    Autotuner._bench = lambda self, *args, config, **_: [math.prod(config.kwargs.values())]
    torch.cuda.device = lambda index: nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=2)
    ssd._on_triton = lambda x: True
    assert ssd._triton_kernels() is not None


def main() -> None:
    use_the_interpreter()
    torch.save({str(case): compute(case) for case in CASES}, sys.argv[1])


if __name__ == "__main__":
    main()
