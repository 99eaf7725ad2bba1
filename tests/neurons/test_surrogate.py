"""SignedSpikeCount: its value by the definition, its slope by the window, its arguments."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from spikingjelly.activation_based.surrogate import SurrogateFunctionBase
from torch.testing import assert_close

from neurons import DeadZoneSpikeCount, SignedSpikeCount, SILIFNode, build, set_backend, spec_of


def test_is_a_surrogate_of_spikingjelly():
    surrogate = SignedSpikeCount()
    assert isinstance(surrogate, SurrogateFunctionBase)
    assert surrogate.state_dict() == {}
    assert (surrogate.max_spike_count, surrogate.alpha, surrogate.grad_window) == (4, 1.0, 4.0)
    assert surrogate.spiking is True


def test_positional_arguments():
    surrogate = SignedSpikeCount(2, 0.5, 3.0, False)
    assert (surrogate.max_spike_count, surrogate.alpha, surrogate.grad_window) == (2, 0.5, 3.0)
    assert surrogate.spiking is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_by_hand(dtype):
    u = torch.tensor([-9, -2.5, -1.75, -0.5, -0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 2.75, math.inf, -math.inf])
    spike = SignedSpikeCount(3)(u.to(dtype))
    assert spike.dtype == dtype
    assert spike.tolist() == [-3, -2, -2, 0, 0, 0, 0, 1, 1, 2, 3, 3, -3]
    assert SignedSpikeCount(3)(torch.tensor(math.nan, dtype=dtype)).isnan()


@pytest.mark.parametrize(("dtype", "top"), [(torch.bfloat16, 128), (torch.float16, 1024)])
def test_exact_in_half_precision_too(dtype, top):
    # In a dtype of p bits |u| - 1/2 is exact up to 2**(p-1), here 2**7 and 2**10.
    u = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    u = u[~u.isnan()]
    wide = u.double().numpy()
    with np.errstate(invalid="ignore"):  # inf - inf
        whole = np.floor(np.abs(wide))
        expected = np.sign(wide) * np.minimum(whole + (np.abs(wide) - whole > 0.5), top)
    np.testing.assert_array_equal(SignedSpikeCount(top)(u).double().numpy(), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_shapes(shape):
    u = torch.ones(shape, requires_grad=True)
    spike = SignedSpikeCount()(u)
    assert spike.shape == shape
    spike.sum().backward()
    assert torch.equal(u.grad, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("window", [None, 0.5, 2.0, 7.25])
def test_slope_is_alpha_inside_the_window_with_its_edge(alpha, window, dtype):
    surrogate = SignedSpikeCount(4, alpha=alpha, grad_window=window)
    edge = torch.tensor(4.0 if window is None else window, dtype=dtype)
    past = edge.nextafter(torch.tensor(math.inf, dtype=dtype))
    u = torch.stack([-past, -edge, -edge / 2, 0 * edge, edge / 3, edge, past, 100 * edge]).requires_grad_()
    upstream = torch.arange(1.0, 9.0, dtype=dtype)  # the chain rule
    (grad,) = torch.autograd.grad(surrogate(u), u, upstream)
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0], dtype=dtype)
    assert torch.equal(grad, upstream * inside * alpha)


def test_no_slope_at_non_finite_potentials():
    u = torch.tensor([math.nan, math.inf, -math.inf], requires_grad=True)
    SignedSpikeCount()(u).sum().backward()
    assert u.grad.tolist() == [0, 0, 0]


def test_infinite_window_is_a_plain_straight_through():
    u = torch.tensor([-1e30, 0.0, 1e30, math.inf], requires_grad=True)
    SignedSpikeCount(grad_window=math.inf)(u).sum().backward()
    assert u.grad.tolist() == [1, 1, 1, 1]


def test_the_potential_is_not_modified():
    u = torch.randn(20)
    before = u.clone()
    SignedSpikeCount()(u).zero_()
    assert torch.equal(u, before)
    assert u._version == 0


def test_without_spiking_the_primitive_has_the_same_slope():
    surrogate = SignedSpikeCount(2, alpha=0.5, grad_window=3.0, spiking=False)
    u = torch.tensor([-5.0, -3.0, 0.0, 1.25, 3.0, 4.0], requires_grad=True)
    out = surrogate(u)
    assert_close(out, torch.tensor([-1.5, -1.5, 0.0, 0.625, 1.5, 1.5]))
    out.sum().backward()
    slope, u.grad = u.grad, None
    surrogate.set_spiking_mode(True)
    out = surrogate(u)
    assert out.tolist() == [-2, -2, 0, 1, 2, 2]
    out.sum().backward()
    assert torch.equal(slope, u.grad)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(clone):
    surrogate = clone(SignedSpikeCount(3, alpha=0.25, grad_window=1.5))
    u = torch.tensor([1.4, 1.6, 9.0], requires_grad=True)
    out = surrogate(u)
    out.sum().backward()
    assert out.tolist() == [1, 2, 3]
    assert u.grad.tolist() == [0.25, 0, 0]


def test_repr():
    expected = "SignedSpikeCount(max_spike_count=2, alpha=0.5, grad_window=2.0, spiking=True)"
    assert repr(SignedSpikeCount(2, alpha=0.5)) == expected


@pytest.mark.parametrize("count", [True, False, 4.0, "4", None, 2.5])
def test_max_spike_count_is_an_integer(count):
    with pytest.raises(TypeError, match="max_spike_count must be an integer"):
        SignedSpikeCount(count)


@pytest.mark.parametrize("count", [0, -1])
def test_max_spike_count_is_positive(count):
    with pytest.raises(ValueError, match="max_spike_count must be at least 1"):
        SignedSpikeCount(count)


def test_max_spike_count_may_be_numpys():
    surrogate = SignedSpikeCount(np.int64(3))
    assert surrogate.max_spike_count == 3
    assert type(surrogate.max_spike_count) is int


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha must be finite and positive"):
        SignedSpikeCount(alpha=alpha)


@pytest.mark.parametrize("window", [0.0, -1.0, math.nan])
def test_window_out_of_range(window):
    with pytest.raises(ValueError, match="grad_window must be positive"):
        SignedSpikeCount(grad_window=window)


def test_compiled_gradients_flow():
    """torch 2.11 compiled a function whose last step is in place to no gradient at all."""
    torch.compiler.reset()
    surrogate = SignedSpikeCount(4)
    u = torch.linspace(-6, 6, 50, requires_grad=True)

    def function(u):
        return surrogate(u * 1.5) * torch.arange(50)

    (expected,) = torch.autograd.grad(function(u).sum(), u)
    (actual,) = torch.autograd.grad(torch.compile(function, backend="aot_eager")(u).sum(), u)
    assert torch.equal(actual, expected)
    assert expected.abs().sum() > 0


def test_a_dead_zone_by_hand():
    u = torch.tensor([-9, -1.6, -1.25, -0.9, -0.75, -0.6, 0.0, 0.75, 0.76, 1.5, 1.75, 9], requires_grad=True)
    surrogate = DeadZoneSpikeCount(3, 0.75)
    spike = surrogate(u)
    assert spike.tolist() == [-3, -2, -1, -1, 0, 0, 0, 0, 1, 1, 2, 3]
    spike.sum().backward()
    assert u.grad.tolist() == [0, *[1] * 10, 0]
    assert surrogate(torch.tensor(math.nan)).isnan()
    assert surrogate(torch.tensor(-math.inf)) == -3
    x = torch.randn(1000) * 3
    assert torch.equal(DeadZoneSpikeCount(4, 0.5)(x), SignedSpikeCount(4)(x))


def test_a_dead_zone_belongs_to_a_node():
    """In a configuration, and back; the kernels, which have none, say so."""
    node = SILIFNode(3, surrogate_function=DeadZoneSpikeCount(3, 1.0))
    again = build(spec_of(node))
    assert again.surrogate_function.dead_zone == 1.0
    assert again(torch.tensor([0.9, 1.1])).tolist() == [0, 1]
    node.step_mode = "m"
    set_backend(node, "cupy")
    with pytest.raises((TypeError, RuntimeError), match=r"SignedSpikeCount|CuPy|cupy"):
        node(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("dead_zone", "error"), [(0.4, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_dead_zones_that_are_none(dead_zone, error):
    with pytest.raises(error, match="dead_zone"):
        DeadZoneSpikeCount(4, dead_zone)
