"""The event-driven layer on a GPU: integers equal to the oracle's, captured, on streams, in compiled code."""

import importlib.util
import itertools

import pytest
import torch

from neurons import EventDrivenLinear, functional
from tests.neurons.test_event_linear import random_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy"),
]


def spikes_of(rows: int, inputs: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    return spikes * (torch.rand(spikes.shape, generator=generator) < share).to(torch.int8)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_sums_equal_the_oracle(weights: str, share: float) -> None:
    sizes = [(0, 3), (3, 0), (31, 5), (130, 67), (2048, 8512), (4096, 2048), (769, 3352)]
    for (inputs, outputs), rows in itertools.product(sizes, (1, 3, 8, 9, 40)):
        layer = random_layer(inputs, outputs, weights, backend="cupy")
        spikes = spikes_of(rows, inputs, share)
        wanted = functional.event_driven_linear(spikes, layer.integer_weight())
        sums = layer.cuda().integer_sums(spikes.cuda())
        assert torch.equal(sums.cpu(), wanted), (inputs, outputs, rows)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_graph_is_replayed_for_other_spikes(weights: str) -> None:
    layer = random_layer(512, 1024, weights, backend="cupy").cuda()
    spikes = spikes_of(4, 512, 0.5).cuda()
    layer.integer_sums(spikes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = layer.integer_sums(spikes)
    for seed in range(3):
        spikes.copy_(spikes_of(4, 512, 0.6, seed))
        graph.replay()
        wanted = functional.event_driven_linear(spikes.cpu(), layer.integer_weight().cpu())
        assert torch.equal(sums.cpu(), wanted)


def test_many_streams() -> None:
    layer = random_layer(1024, 512, "int8", backend="cupy").cuda()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    torch.cuda.synchronize()
    for k, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            found.append(layer.integer_sums(spikes_of(2, 1024, 0.5, k).cuda()))
    torch.cuda.synchronize()
    for k, sums in enumerate(found):
        wanted = functional.event_driven_linear(spikes_of(2, 1024, 0.5, k), layer.integer_weight().cpu())
        assert torch.equal(sums.cpu(), wanted)


def test_floats_come_out_as_on_the_processor() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 96)
    spikes = torch.randint(-4, 5, (3, 300)).float()
    for weights in ("int8", "int4"):
        layer = EventDrivenLinear.from_linear(linear, weights)
        wanted = layer(spikes)
        layer.cuda().backend = "cupy"
        for trusts in (False, True):
            layer.trusts_spikes = trusts
            assert torch.equal(layer(spikes.cuda()).cpu(), wanted)
            assert torch.equal(layer(spikes.cuda().bfloat16()).cpu(), wanted.bfloat16())


def test_compiled_without_a_break() -> None:
    layer = random_layer(256, 512, "int8", backend="cupy").cuda()
    spikes = spikes_of(2, 256, 0.5).cuda()
    compiled = torch.compile(layer.integer_sums, fullgraph=True)
    assert torch.equal(compiled(spikes), layer.integer_sums(spikes))
