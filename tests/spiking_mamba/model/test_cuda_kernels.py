"""A token's CUDA kernels without a GPU: they compile, and on the CPU they equal their reference in torch."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import neurons
from neurons.cupy.event_linear.plan import plan
from spiking_mamba.model.cuda import kernels, reference
from spiking_mamba.model.cuda.parts import Convolution, Given, Kept, Matrix, Neuron, Scan, matrix_of
from tests.neurons.test_event_linear import random_layer


def copied(parts):
    """A tuple of tensors and others, sharing none."""
    return parts._replace(
        **{name: t.clone() for name, t in parts._asdict().items() if isinstance(t, torch.Tensor)}
    )


def random_matrix(inputs: int, outputs: int, weights: str, bias: bool = True) -> Matrix:
    layer = random_layer(inputs, outputs, weights, bias=bias)
    layer.scale /= 1000.0 if weights == "int8" else 100_000.0
    if bias:
        layer.bias.copy_(torch.randn(outputs))
    return matrix_of(layer)


def normed(rows: int, size: int, groups: int = 1, pieces: int = 3) -> Given:
    x = torch.randn(rows, size)
    squares = x.square().unflatten(-1, (groups, -1)).sum(-1, keepdim=True)
    shares = torch.rand(rows, groups, pieces).softmax(-1)
    return Given(x, 2 * torch.rand(size), (squares * shares).flatten(1).contiguous(), groups, 1e-5)


def both(given: Given, matrix: Matrix, neuron: Neuron | None, **then):
    """The results of the kernel and of the reference, and what each has kept and moved on."""
    found = []
    for functions in (kernels, reference):
        own = {key: value.clone() if isinstance(value, torch.Tensor) else copied(value)
               for key, value in then.items()}  # fmt: skip
        shapes = given.x.shape[0], matrix.weight.shape[0], matrix.outputs
        of_sums = torch.float32 if neuron is None else torch.int32
        kept = Kept(
            torch.zeros(shapes[0], shapes[1], dtype=torch.int8),
            torch.zeros(shapes[0], shapes[2], dtype=of_sums),
        )
        y, squares = functions.project(given, matrix, neuron, **own, kept=kept)
        found.append((y, squares, kept, own))
    return found


def check(given: Given, matrix: Matrix, neuron: Neuron | None, **then) -> None:
    (y, squares, kept, own), (right, right_squares, right_kept, right_own) = both(
        given, matrix, neuron, **then
    )
    assert torch.equal(kept.inputs, right_kept.inputs)
    assert kept.inputs.count_nonzero() > 0
    if neuron is not None:
        assert torch.equal(kept.sums, right_kept.sums)
    assert (y - right).norm() <= 1e-5 * right.norm()
    if squares is not None:
        torch.testing.assert_close(squares.sum(-1), right_squares.sum(-1))
    if "convolution" in then:
        torch.testing.assert_close(own["convolution"].state, right_own["convolution"].state)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_input_projection_and_its_convolution(weights: str, rows: int) -> None:
    torch.manual_seed(0)
    matrix = random_matrix(70, 150, weights)  # rows of no sixteen bytes
    for bias in (torch.randn(60), None):
        convolution = Convolution(torch.randn(60, 1, 4), bias, torch.randn(rows, 60, 4), 50)
        given = normed(rows, 70)
        check(given, matrix, Neuron(4), convolution=convolution)
        check(given._replace(shift=torch.randn(70)), matrix, Neuron(4, 1.25), convolution=convolution)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("rows", "groups", "inputs"), [(1, 1, 240), (2, 4, 240), (8, 1, 240), (1, 2, 5760)])
def test_an_output_projection_and_the_stream(rows: int, groups: int, inputs: int) -> None:
    """Of the last one's inputs a warp takes several runs."""
    torch.manual_seed(1)
    for bias in (True, False):
        check(
            normed(rows, inputs, groups),
            random_matrix(inputs, 80, "int8", bias),
            Neuron(3),
            onto=torch.randn(rows, 80),
        )


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_head_and_a_gate(weights: str) -> None:
    torch.manual_seed(2)
    check(normed(2, 100), random_matrix(100, 64, weights, bias=False), None)
    gate = Given(torch.randn(2, 144))
    check(gate, random_matrix(72, 64, weights), Neuron(127), onto=torch.randn(2, 64))
    check(
        gate._replace(shift=torch.randn(72)),
        random_matrix(72, 64, weights),
        Neuron(127, 2.5),
        onto=torch.randn(2, 64),
    )
    check(gate, random_matrix(72, 64, weights), None)


@pytest.mark.parametrize("dead_zone", [0.5, 0.75, 2.0])
def test_the_reference_spikes_as_the_neuron_does(dead_zone: float) -> None:
    u = torch.cat([torch.arange(-12, 13) / 4, torch.tensor([0.5000001, -0.4999999, 1e30, -1e30])])[None]
    given = Given(torch.cat([torch.full_like(u, 100.0), u / 100.0], 1))  # SiLU(100) is 100
    matrix = random_matrix(u.shape[1], 16, "int8")
    kept = Kept(torch.zeros(u.shape, dtype=torch.int8), torch.zeros(1, 16, dtype=torch.int32))
    reference.project(given, matrix, Neuron(4, dead_zone), kept=kept)
    surrogate = neurons.DeadZoneSpikeCount(4, dead_zone)
    spikes = neurons.functional.signed_spike_count(100.0 * (u / 100.0), 1.0, surrogate)
    assert torch.equal(kept.inputs, spikes.to(torch.int8))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    shapes = [(1, 4, 16, 8, 1), (2, 4, 64, 128, 2), (3, 2, 6, 70, 1)]
    for (rows, heads, channels, size, groups), low in zip(shapes, (0.0, 0.02, 0.0), strict=True):
        A_log, dt_bias, D = torch.randn(3, heads)
        state = torch.randn(rows, heads, channels, size).to(dtype)
        projected = torch.randn(rows, 2 * heads * channels + 2 * groups * size + heads)
        mixer = Scan(dt_bias, A_log, D, state, groups, (low, float("inf")))
        ours, right = copied(mixer), copied(mixer)
        y, squares = kernels.scan(projected, ours)
        wanted, wanted_squares = reference.scan(projected, right)
        assert (y - wanted).norm() <= 1e-5 * wanted.norm()
        # a last bit of float32 may round a state to another bfloat16
        bound = 1e-5 if dtype == torch.float32 else 1e-3
        difference = (ours.state.float() - right.state.float()).norm()
        assert 0 < difference + 1 <= 1 + bound * right.state.float().norm()
        assert not torch.equal(ours.state, state)
        sums = [s.unflatten(-1, (groups, -1)).sum(-1) for s in (squares, wanted_squares)]
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("host")
def test_the_embedding() -> None:
    table = torch.randn(11, 300)
    for tokens in (torch.tensor([3]), torch.tensor([0, 10, 5])):
        found, right = kernels.embed(tokens, table), reference.embed(tokens, table)
        assert torch.equal(found.x, right.x)
        torch.testing.assert_close(found.squares, right.squares)


SIZES = (
    (2048, 8512, "CONVOLVE", False),
    (4096, 2048, "RESIDUAL", False),
    (768, 3360, "CONVOLVE", False),
    (2048, 50288, "PLAIN", True),
    (2048, 8512, "CONVOLVE", True),
)


def loads_of_states(ptx: str) -> set[int]:
    """Sizes in bytes of the loads that pass the caches by, as those of states do."""
    found = re.findall(r"ld\.global\.cs\.(v[24]\.)?[a-z](\d+)", ptx)
    return {int(vector.strip("v.") or 1) * int(bits) // 8 for vector, bits in found}


def bytes_of_states(options: tuple[str, ...]) -> set[int]:
    """What a lane's neighbouring states take."""
    named = dict(option[2:].split("=") for option in options if option.startswith("-D"))
    size = int(named["STATE_SIZE"])
    together = 4 if size % 4 == 0 and size >= 128 else 2 if size % 2 == 0 and size >= 64 else 1
    return {together * (4 if named["STATE"] == "F32" else 2)}


@pytest.mark.parametrize(("arch", "largest"), [(80, 1), (90, 8)])
def test_compiles_to_ptx(nvrtc, arch: int, largest: int) -> None:
    cases = list(itertools.product((1, 8) if arch == 90 else (2,), (8, 4), SIZES))
    options = []
    for (rows, bits, (inputs, outputs, after, floats)), groups, shifted in zip(
        cases, itertools.cycle((1, 2, None)), itertools.cycle((True, False)), strict=False
    ):
        found = plan(bits, rows, inputs, outputs * bits // 8, largest=largest, floats=floats)
        named = kernels.project_options(found, bits, floats, after, groups, 4, shifted and not floats)
        options.append((kernels.PROJECT, named, "project"))
    for state, (heads, channels) in itertools.product(
        (torch.float32, torch.bfloat16), ((64, 64), (24, 64), (4, 6))
    ):
        parts = kernels.scan_parts(channels, heads)
        options.append((kernels.MIX, kernels.mix_options(channels, 128, *parts, state), "scan_token"))
        if channels == 6:
            for size in (16, 33, 70):  # whose lanes hold one or two states
                few = kernels.mix_options(channels, size, *parts, state)
                options.append((kernels.MIX, few, "scan_token"))
    flags = (f"-arch=compute_{arch}", "-ftz=true")  # which CuPy adds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = list(pool.map(lambda each: nvrtc.ptx(each[0], (*each[1], *flags)), options))
    for (_, named, name), ptx in zip(options, sources, strict=True):
        assert f".entry {name}(" in ptx
        if name == "scan_token":
            assert loads_of_states(ptx) == bytes_of_states(named), named
        assert "atom" not in ptx
        assert "local" not in ptx
        assert ("griddepcontrol" in ptx) == (arch == 90)
