"""The event-driven layer's CUDA kernel without a GPU: it compiles, and on the CPU it equals the oracle."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import neurons
from neurons import EventDrivenLinear
from neurons.cupy.event_linear import ops
from neurons.cupy.event_linear.plan import WARPS_WANTED, Plan, plan
from tests.neurons.test_event_linear import by_hand, random_layer

BATCHES = (1, 2, 4, 8)
SIZES = ((2048, 8512), (4096, 2048), (768, 3352), (1536, 768), (2048, 50288), (37, 33))


def every_plan(largest: int) -> list[tuple[int, Plan]]:
    """What the operators ask for at these sizes."""
    found = {
        (bits, plan(bits, batch, inputs, -(-outputs * bits // 8), largest=largest))
        for bits, batch, (inputs, outputs) in itertools.product((8, 4), BATCHES, SIZES)
    }
    return sorted(found)


@pytest.mark.parametrize(("arch", "largest"), [(80, 1), (90, 8)])
def test_compiles_to_ptx(nvrtc, arch: int, largest: int) -> None:
    plans = every_plan(largest) if arch == 90 else every_plan(largest)[::5]
    outputs = itertools.cycle((None, torch.float32, torch.float16, torch.bfloat16))
    options = [
        (*ops.module_options(*each, dtype), f"-arch=compute_{arch}")
        for each, dtype in zip(plans, outputs, strict=False)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = list(pool.map(lambda o: nvrtc.ptx(ops.SOURCE, o), options))
    for (_, found), ptx in zip(plans, sources, strict=True):
        assert ".entry event_linear(" in ptx
        assert "dp4a" in ptx
        loads = {16: "v4.u32", 8: "v2.u32", 4: ".u32", 1: ".u8"}[found.vec]
        once = [line.replace(".s", ".u") for line in ptx.splitlines() if line.startswith("\tld.global.cs.")]
        assert once
        assert all(loads in line for line in once)
        assert (".reqnctapercluster" in ptx) == ("st.async.shared::cluster" in ptx) == (found.cluster > 1)
        assert "atom" not in ptx
        assert "local" not in ptx  # nothing has left the registers


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sums_equal_the_oracle(weights: str, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for (inputs, outputs), rows in itertools.product(
        [(0, 3), (3, 0), (1, 1), (130, 67), (300, 528)], (1, 3, 11)
    ):
        layer = random_layer(inputs, outputs, weights, backend="cupy")
        spikes = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        spikes *= (torch.rand(spikes.shape, generator=generator) < share).to(torch.int8)
        sums = layer.integer_sums(spikes)
        assert sums.dtype == torch.int32
        wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
        assert torch.equal(sums, wanted), (inputs, outputs, rows)
        if inputs and inputs * outputs < 10_000:
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


LAYOUTS = [
    (8, Plan(1, 16, 32, 4, 8, 1)),
    (8, Plan(2, 8, 8, 16, 2, 2)),
    (8, Plan(4, 4, 16, 4, 1, 2)),
    (4, Plan(1, 16, 8, 8, 4, 1)),
    (4, Plan(2, 4, 32, 4, 8, 1)),
]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("bits", "layout"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same_integers(monkeypatch, bits: int, layout: Plan) -> None:
    layer = random_layer(700, 96, f"int{bits}", backend="cupy")
    spikes = torch.randint(-3, 4, (layout.batch, 700), dtype=torch.int8)
    wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
    slabs = -(-layer.weight.shape[1] // (layout.vec * layout.lanes))
    monkeypatch.setattr(ops, "plan", lambda *_: layout._replace(slabs=slabs))
    assert torch.equal(layer.integer_sums(spikes), wanted)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = EventDrivenLinear.from_linear(torch.nn.Linear(70, 48), "int8")
    spikes = torch.randint(-4, 5, (2, 3, 70)).to(dtype)
    wanted = layer(spikes)
    layer.backend = "cupy"
    assert torch.equal(layer(spikes), wanted)
    assert layer(spikes).dtype == dtype
    call = ops.Scaled(8, 48, dtype)
    residual = torch.randn(6, 48).to(dtype)
    flat = spikes.flatten(0, 1).to(torch.int8)
    arguments = layer.weight, None, layer.scale
    plain = ops.event_driven_linear_scaled(
        flat, *arguments, layer.bias, None, call._replace(dtype=torch.float32)
    )
    found = ops.event_driven_linear_scaled(flat, *arguments, layer.bias, residual, call)
    assert torch.equal(found, (residual.float() + plain).to(dtype))
    no_bias = ops.event_driven_linear_scaled(flat, *arguments, None, None, call._replace(dtype=torch.float32))
    assert torch.equal(no_bias + layer.bias, plain)


def test_plans_fill_the_gpu() -> None:
    for inputs, row in ((2048, 8512), (4096, 2048), (768, 3352), (1536, 768)):
        for batch in BATCHES:
            found = plan(8, batch, inputs, row)
            assert found.slabs * found.lanes * found.vec >= row
            assert row % found.vec == 0
            at_work = found.slabs * min(found.cluster * found.warps, -(-inputs // 32))
            # or as many as there can be where lanes have as many sums as registers hold
            assert at_work >= WARPS_WANTED or found.lanes == 8
            assert at_work >= min(1000, found.slabs * -(-inputs // 32) // 2)


@pytest.mark.usefixtures("host")
def test_spikes_that_are_trusted_are_still_looked_at_on_a_processor() -> None:
    layer = random_layer(8, 8, "int8", backend="cupy")
    layer.trusts_spikes = True
    with pytest.raises(ValueError, match="must be integers"):
        layer(torch.full((1, 8), 0.5))


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
    torch.library.opcheck(
        ops.event_driven_linear_scaled.definition,
        (spikes, layer.weight, None, layer.scale, None, None, 8, 32, torch.float16),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.usefixtures("host")
def test_compiled_without_a_break() -> None:
    layer = random_layer(64, 32, "int8", backend="cupy")
    spikes = torch.randint(-3, 4, (2, 64), dtype=torch.int8)
    for function, of in ((layer.integer_sums, spikes), (layer, spikes)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(of), function(of))
