"""The event-driven layer: its integers against a loop written out, its weights, its words for bad input."""

import copy
import io
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional as sj
from torch import nn

import neurons
from neurons import EventDrivenLinear, SILIFNode, set_backend
from neurons.rounding import int4_weights, int8_weights

BACKENDS = ["torch", pytest.param("numba", marks=pytest.mark.numba)]


@pytest.fixture(autouse=True)
def _numba(request):
    if request.node.get_closest_marker("numba"):
        pytest.importorskip("numba")


def by_hand(spikes: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """One row of spikes, Python's own integers."""
    rows = weight.tolist()
    return [sum(s * row[o] for s, row in zip(spikes.tolist(), rows)) for o in range(weight.shape[1])]  # noqa: B905


def random_layer(in_features, out_features, weights, seed=0, bias=False, backend="torch"):
    """Every value that the weights can have."""
    layer = EventDrivenLinear(in_features, out_features, bias, weights, backend)
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if weights == "int8" else (0, 256)
    layer.weight.copy_(torch.randint(low, high, layer.weight.shape, generator=generator))
    if weights == "int4":
        layer.group_scale.copy_(torch.randint(256, layer.group_scale.shape, generator=generator))
    layer.scale.copy_(torch.rand(out_features, generator=generator))
    return layer


def test_the_oracle_by_hand():
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((0, 3), (1, 1), (5, 7), (40, 3)):
        spikes = torch.randint(-128, 128, (inputs,), generator=generator, dtype=torch.int8)
        weight = torch.randint(-128, 128, (inputs, outputs), generator=generator, dtype=torch.int8)
        sums = neurons.functional.event_driven_linear(spikes, weight)
        assert sums.dtype == torch.int32
        assert sums.tolist() == by_hand(spikes, weight)


def test_the_oracle_refuses():
    oracle = neurons.functional.event_driven_linear
    spikes, weight = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="must be int8"):
        oracle(spikes.float(), weight)
    with pytest.raises(TypeError, match="must be int8"):
        oracle(spikes, weight.float())
    with pytest.raises(ValueError, match="do not fit"):
        oracle(spikes, weight.t())
    most = torch.full((2**17,), -128, dtype=torch.int8)
    with pytest.raises(ValueError, match="leaves 32 bits"):
        oracle(most, most[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sums_equal_the_oracle(backend, weights, share):
    generator = torch.Generator().manual_seed(1)
    for inputs, outputs in ((0, 3), (3, 0), (1, 1), (31, 5), (33, 64), (64, 129), (130, 67)):
        layer = random_layer(inputs, outputs, weights, backend=backend)
        spikes = torch.randint(-128, 128, (2, 3, inputs), generator=generator, dtype=torch.int8)
        spikes *= (torch.rand(spikes.shape, generator=generator) < share).to(torch.int8)
        sums = layer.integer_sums(spikes)
        assert sums.dtype == torch.int32
        wanted = neurons.functional.event_driven_linear(spikes, layer.integer_weight())
        assert torch.equal(sums, wanted)
        if inputs:
            assert sums[1, 2].tolist() == by_hand(spikes[1, 2], layer.integer_weight())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_extremes(backend, weights):
    layer = random_layer(1000, 3, weights, backend=backend)
    layer.weight.fill_(-128 if weights == "int8" else 0)  # 0 is -8
    if weights == "int4":
        layer.group_scale.fill_(255)
    each = -128 if weights == "int8" else -8 * 255
    for spike in (-128, 127):
        sums = layer.integer_sums(torch.full((1000,), spike, dtype=torch.int8))
        assert sums.tolist() == [1000 * each * spike] * 3


@pytest.mark.numba
@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(0, 140),
    outputs=st.integers(0, 140),
    rows=st.integers(0, 3),
    share=st.floats(0, 1),
    weights=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 2**31),
)
def test_both_backends_have_the_same_integers(inputs, outputs, rows, share, weights, seed):
    layer = random_layer(inputs, outputs, weights, seed, backend="numba")
    generator = torch.Generator().manual_seed(seed)
    spikes = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    spikes *= (torch.rand(spikes.shape, generator=generator) < share).to(torch.int8)
    found = layer.integer_sums(spikes)
    layer.backend = "torch"
    assert torch.equal(found, layer.integer_sums(spikes))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounding_stays_within_half_a_step(weights):
    torch.manual_seed(0)
    linear = nn.Linear(100, 37)
    with torch.no_grad():
        linear.weight[3] = 0.0
        linear.weight[5, 32:64] = 0.0
    layer = EventDrivenLinear.from_linear(linear, weights)
    values = layer.integer_weight() * layer.scale
    error = (values.t() - linear.weight).abs()
    if weights == "int8":
        step = layer.scale[:, None].expand(37, 100)
        assert int(layer.weight.min()) >= -127
    else:
        step = (layer.group_scale * layer.scale).t().repeat_interleave(32, 1)[:, :100]
        largest = linear.weight[:, :32].abs().amax(1)
        assert bool((step[:, 0] <= largest / 7 + layer.scale).all())
    assert bool((error <= 0.5001 * step).all())
    assert not values[:, 3].any()
    y = layer(torch.eye(100))
    assert torch.allclose(y, values + linear.bias)


def test_weights_of_one_input_and_of_none():
    assert int8_weights(torch.zeros(3, 0))[0].shape == (0, 3)
    integers, group_scale, scale = int4_weights(torch.zeros(3, 0))
    assert (integers.shape, group_scale.shape, scale.shape) == ((0, 3), (0, 3), (3,))
    integers, group_scale, scale = int4_weights(torch.tensor([[-4.0], [7.0]]))
    values = integers.t() * group_scale.t() * scale[:, None]
    assert torch.allclose(values, torch.tensor([[-4.0], [7.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floating_spikes_keep_their_dtype(dtype):
    layer = random_layer(40, 9, "int8", bias=True)
    spikes = torch.randint(-4, 5, (2, 40))
    y = layer(spikes.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, (layer.integer_sums(spikes) * layer.scale + layer.bias).to(dtype))
    assert layer(spikes).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_spike_is_refused(backend):
    layer = EventDrivenLinear(2, 3, backend=backend)
    for bad in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="integers"):
            layer(torch.tensor([1.0, bad]))
    for bad in (
        torch.tensor([1.0, 128.0]),
        torch.tensor([-129, 0]),
        torch.tensor([200, 0], dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="-128 to 127"):
            layer(bad)
    with pytest.raises(ValueError, match="width 2"):
        layer(torch.zeros(3))
    with pytest.raises(TypeError, match="complex"):
        layer(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="no gradient"):
        layer(torch.zeros(2, requires_grad=True))


def test_bad_parameters():
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        EventDrivenLinear(2, 2, weights="int2")
    with pytest.raises(ValueError, match="backend must be one of"):
        EventDrivenLinear(2, 2, backend="cuda")
    with pytest.raises(ValueError, match="32 bits"):
        EventDrivenLinear(2**17, 1)
    with pytest.raises(ValueError, match="32 bits"):
        int4_weights(torch.zeros(1, 2**21 + 1))


def test_many_inputs_of_4_bits_get_coarser_scales():
    weight = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0))
    layer = EventDrivenLinear.from_linear(_linear(weight), "int4")
    most = torch.where(layer.integer_weight() > 0, 127, -128).t().to(torch.int8)
    assert int(layer.integer_sums(most)) > 0  # and has not left 32 bits
    assert 100 < int(layer.group_scale.max()) < 255


def _linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_loads_copies_and_pickles(weights, backend):
    layer = EventDrivenLinear.from_linear(nn.Linear(70, 33), weights, backend)
    spikes = torch.randint(-9, 10, (2, 70))
    wanted = layer(spikes)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = EventDrivenLinear(70, 33, weights=weights, backend=backend)
    before = other(spikes)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert not torch.equal(before, wanted)
    for one in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one(spikes), wanted)
        assert one.backend == backend


def test_without_numba_the_call_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    neurons.backend.check_numba.cache_clear()
    layer = EventDrivenLinear(2, 2, backend="numba")
    with pytest.raises(RuntimeError, match=r"numba.*pip install numba"):
        layer(torch.ones(2))
    layer.backend = "torch"
    assert layer(torch.ones(2)).shape == (2,)
    neurons.backend.check_numba.cache_clear()


@pytest.mark.numba
def test_numba_never_takes_tensors_of_another_device():
    layer = EventDrivenLinear(2, 2, backend="numba")
    with pytest.raises(RuntimeError, match="on the CPU"):
        layer.integer_sums(torch.empty(2, dtype=torch.int8, device="meta"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_spiking_net(backend):
    torch.manual_seed(0)
    net = nn.Sequential(SILIFNode(8, step_mode="m"), nn.Linear(50, 20), SILIFNode(8, step_mode="m"))
    x = 3 * torch.randn(4, 2, 50)
    layer = EventDrivenLinear.from_linear(net[1])
    with torch.no_grad():
        net[1].weight.copy_((layer.integer_weight() * layer.scale).t())
        wanted = net[1](net[0](x))
        sj.reset_net(net)
        net[1] = layer
        set_backend(net, backend)
        found = layer(net[0](x))
    assert layer.backend == backend
    assert net[0].backend == "torch"  # numba is none of the nodes'
    assert torch.allclose(found, wanted, atol=1e-5)
