"""The event-driven layer's CUDA kernel without a GPU: it compiles, and on the CPU it equals the oracle."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import neurons
from neurons import EventDrivenLinear
from neurons.cupy.event_linear import ops
from tests.neurons.test_event_linear import by_hand, random_layer

BATCHES = (1, 2, 4, 8)


def every_plan():
    """What the operator can ask for, with both numbers of chunks that occur most."""
    rows = (16 * 33, 8 * 33, 4 * 33, 33)
    found = [ops.plan(*of) for of in itertools.product((8, 4), BATCHES, (64,), rows)]
    return sorted({(bits, *plan[:3], c) for bits in (8, 4) for plan in found for c in (1, 4)
                   if plan.vec * (8 // bits) * plan.batch <= 64})  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_to_ptx(nvrtc, arch: int) -> None:
    plans = every_plan() if arch == 90 else every_plan()[::6]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = list(
            pool.map(
                lambda p: nvrtc.ptx(ops.SOURCE, (*ops.module_options(*p), f"-arch=compute_{arch}")), plans
            )
        )
    for (_, _, vec, _, _), ptx in zip(plans, sources, strict=True):
        assert ".entry event_linear(" in ptx
        assert "dp4a" in ptx
        loads = {16: "v4.u32", 8: "v2.u32", 4: ".u32", 1: ".u8"}[vec]
        assert any(line.split()[0].startswith("ld.") and loads in line.replace(".b", ".u")
                   for line in ptx.splitlines() if line.startswith("\tld."))  # fmt: skip
        assert "local" not in ptx  # nothing has left the registers


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sums_equal_the_oracle(weights: str, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = [(0, 3), (3, 0), (1, 1), (31, 5), (33, 64), (64, 129), (130, 67), (512, 528), (300, 1040)]
    for (inputs, outputs), rows in itertools.product(sizes, (1, 2, 3, 8, 11)):
        layer = random_layer(inputs, outputs, weights, backend="cupy")
        spikes = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        spikes *= (torch.rand(spikes.shape, generator=generator) < share).to(torch.int8)
        sums = layer.integer_sums(spikes)
        assert sums.dtype == torch.int32
        wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
        assert torch.equal(sums, wanted), (inputs, outputs, rows)
        if inputs and inputs * outputs < 5000:
            assert sums[-1].tolist() == by_hand(spikes[-1], layer.integer_weight())


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_extremes_and_shapes(weights: str) -> None:
    layer = random_layer(1000, 16, weights, backend="cupy")
    layer.weight.fill_(-128 if weights == "int8" else 0)  # 0 is -8
    if weights == "int4":
        layer.group_scale.fill_(255)
    each = -128 if weights == "int8" else -8 * 255
    for spike in (-128, 127):
        sums = layer.integer_sums(torch.full((2, 1, 1000), spike, dtype=torch.int8))
        assert sums.tolist() == [[[1000 * each * spike] * 16]] * 2
    assert layer.integer_sums(torch.zeros(3, 0, 1000, dtype=torch.int8)).shape == (3, 0, 16)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_views_that_no_wide_access_may_touch(weights: str) -> None:
    layer = random_layer(64, 64, weights, backend="cupy")
    buffer = torch.zeros(layer.weight.numel() + 1, dtype=layer.weight.dtype)
    moved = buffer[1:].view(layer.weight.shape)
    moved.copy_(layer.weight)
    spikes = torch.randint(-128, 128, (4 * 64 + 1,), dtype=torch.int8)[1:].view(4, 64)
    wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
    layer.weight = moved
    assert torch.equal(layer.integer_sums(spikes), wanted)
    assert torch.equal(layer.integer_sums(spikes[:, :]), wanted)
    assert torch.equal(layer.integer_sums(spikes.t().contiguous().t()), wanted)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_runs_of_inputs_in_a_row(monkeypatch, bits: int, chunks: int) -> None:
    layer = random_layer(700, 96, f"int{bits}", backend="cupy")
    spikes = torch.randint(-3, 4, (2, 700), dtype=torch.int8)
    wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
    found = ops.plan(bits, 2, 704, layer.weight.shape[1])
    runs = 704 // (16 if bits == 8 else 32)
    other = found._replace(chunks=chunks, grid=(found.grid[0], -(-runs // (found.warps * chunks))))
    monkeypatch.setattr(ops, "plan", lambda *_: other)
    assert torch.equal(layer.integer_sums(spikes), wanted)


def test_plans_fill_the_gpu() -> None:
    for inputs, row in ((2048, 8512), (4096, 2048), (768, 3352), (1536, 768)):
        for batch in BATCHES:
            found = ops.plan(8, batch, inputs, row)
            launched = found.grid[0] * found.grid[1] * found.warps
            widest = 16 if batch <= 4 else 8
            assert found.vec == (widest if row % widest == 0 else 8)
            assert found.grid[0] * 32 * found.vec >= row
            assert found.grid[1] * found.warps * found.chunks * 16 >= inputs
            assert launched >= 1000 or found.chunks == 1


def test_what_cannot_run_is_said() -> None:
    layer = EventDrivenLinear(8, 8, backend="cupy")
    with pytest.raises(RuntimeError, match=r"CuPy|CUDA"):
        layer(torch.zeros(1, 8, dtype=torch.int8))


@pytest.mark.usefixtures("host")
def test_the_operator_is_known_to_torch() -> None:
    layer = random_layer(64, 32, "int8", backend="cupy")
    spikes = torch.randint(-3, 4, (2, 64), dtype=torch.int8)
    torch.library.opcheck(
        ops.event_driven_linear.definition,
        (spikes, layer.weight, None, 8, 32),
        test_utils=("test_schema", "test_faketensor"),
    )
