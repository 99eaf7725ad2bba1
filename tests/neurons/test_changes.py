"""Whether tensors have changed: by what torch counts, and by which tensors they are."""

import gc

import pytest
import torch

import neurons
from neurons import EventDrivenLinear
from neurons.changes import Seen


def test_what_counts_as_a_change():
    tensors = [torch.zeros(4), torch.zeros(3)]
    seen = Seen(tensors)
    assert seen.unchanged(tensors)
    assert seen.unchanged(iter(tensors))
    assert not seen.unchanged(tensors[:1])
    assert not seen.unchanged(tensors[::-1])
    assert not seen.unchanged([tensors[0], tensors[1].clone()])
    tensors[1].add_(1)
    assert not seen.unchanged(tensors)
    parameter = torch.nn.Parameter(torch.zeros(2))
    seen = Seen([parameter])
    parameter.data = torch.ones(2)
    assert not seen.unchanged([parameter])


def test_an_address_that_another_tensor_has_by_now():
    for _ in range(50):
        tensor = torch.zeros(1000)
        seen, address = Seen([tensor]), tensor.data_ptr()
        del tensor
        gc.collect()
        other = torch.zeros(1000)
        assert not seen.unchanged([other])
        if other.data_ptr() == address:
            return
    pytest.skip("the allocator gave no address twice")


@pytest.mark.numba
def test_weights_that_are_replaced_again_and_again():
    pytest.importorskip("numba")
    layer = EventDrivenLinear.from_linear(torch.nn.Linear(64, 64), backend="numba")
    spikes = torch.ones(1, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for _ in range(3):
            layer.weight = torch.randint(-9, 9, (64, 64), dtype=torch.int8, generator=generator)
        right = neurons.functional.event_driven_linear(spikes.to(torch.int8), layer.weight)
        assert torch.equal(layer.integer_sums(spikes), right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_scales_stay_in_float32(weights, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 16)
    spikes = torch.randint(-128, 128, (3, 512)).float()
    layer = EventDrivenLinear.from_linear(linear, weights)
    wanted = layer(spikes)
    layer.to(dtype)
    assert layer.scale.dtype == layer.bias.dtype == torch.float32
    found = layer(spikes.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=0, atol=0)
