"""Signed counts to ternary micro-steps and back."""

import copy
import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.testing import assert_close

from neurons import MicroStepSum, SignedCountToTernary, SILIFNode, TILIFNode

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BOTH = pytest.mark.parametrize("cls", [SignedCountToTernary, MicroStepSum])


def counts(top: int, shape: tuple[int, ...] = (6, 4, 5), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(top)
    return torch.randint(-top, top + 1, shape, generator=generator).to(dtype)


def test_micro_steps_by_hand():
    ternary = SignedCountToTernary(3)(torch.tensor([[0.0, 1.0, -2.0], [3.0, -3.0, -1.0]]))
    # count:   0, 1, -2              3, -3, -1
    assert ternary.tolist() == [[0, 1, -1], [0, 0, -1], [0, 0, 0], [1, -1, -1], [1, -1, 0], [1, -1, 0]]


def test_sum_by_hand():
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0, 0.5, -0.25])
    assert MicroStepSum(3)(x).tolist() == [111.0, 1000.25]
    assert MicroStepSum(2)(x).tolist() == [11.0, 1100.0, 0.25]
    assert MicroStepSum(1)(x).tolist() == x.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [1, 2, 4, 8])
def test_round_trip_is_exact(top, dtype):
    count = counts(top, dtype=dtype)
    before = count.clone()
    ternary = SignedCountToTernary(top)(count)
    assert ternary.shape == (6 * top, 4, 5)
    assert ternary.dtype == dtype
    assert bool((ternary.abs() <= 1).all())
    total = MicroStepSum(top)(ternary)
    assert total.dtype == dtype
    assert torch.equal(total, count)
    assert torch.equal(count, before)


def test_every_exact_bfloat16_count():
    count = torch.arange(-256, 257).bfloat16().unsqueeze(0)
    assert torch.equal(MicroStepSum(256)(SignedCountToTernary(256)(count)), count)


@pytest.mark.parametrize("shape", [(3,), (0,), (0, 4), (3, 0), (2, 3, 4, 5), (1, 2, 0, 3)])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_shapes(shape, needs_grad):
    count = counts(2, shape).requires_grad_(needs_grad)
    ternary = SignedCountToTernary(2)(count)
    assert ternary.shape == (2 * shape[0], *shape[1:])
    total = MicroStepSum(2)(ternary)
    assert torch.equal(total, count)
    if needs_grad:
        total.sum().backward()
        assert torch.equal(count.grad, torch.ones(shape))


@pytest.mark.parametrize("top", [1, 3, 8])
def test_order_is_that_of_the_ternary_neuron(top):
    torch.manual_seed(0)
    x = 2 * top * torch.rand(5, 300) - top
    for step in x:  # each token starts afresh, as in the model's token mode
        micro = torch.zeros(top, 300)
        micro[0] = step
        unrolled = SignedCountToTernary(top)(SILIFNode(top)(step).unsqueeze(0))
        assert torch.equal(unrolled, TILIFNode(step_mode="m")(micro))


def test_converts_in_training_and_evaluation():
    for training in (True, False):
        assert SignedCountToTernary(4).train(training)(counts(4)).shape[0] == 24
        assert MicroStepSum(4).train(training)(torch.zeros(24, 1)).shape[0] == 6


def test_agrees_with_spikingjelly_on_unsigned_counts():
    count = counts(4).abs()
    ternary = SignedCountToTernary(4)(count)
    assert torch.equal(ternary, layer.SpikeCountToBinary(4, always_convert=True)(count))
    x = torch.randn(8, 3)
    assert_close(MicroStepSum(4)(x), layer.TemporalBinSum(4, always_convert=True)(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_between_them_is_the_linear_of_the_count(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias=False).to(dtype)
    with torch.no_grad():  # whole numbers: every sum is exact in every dtype
        linear.weight.copy_(torch.randint(-4, 5, (7, 5)))
    net = nn.Sequential(SignedCountToTernary(4), linear, MicroStepSum(4))
    assert torch.equal(net(counts(4, dtype=dtype)), linear(counts(4, dtype=dtype)))


def test_gradients_through_a_linear_layer_between_them():
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias=False).double()
    weight = torch.randn(6, 4, 7, dtype=torch.float64)
    grads = []
    for net in (nn.Sequential(SignedCountToTernary(4), linear, MicroStepSum(4)), linear):
        count = counts(4, dtype=torch.float64).requires_grad_()
        grads.append(torch.autograd.grad((weight * net(count)).sum(), [count, linear.weight]))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)
        assert a.any()


def test_each_micro_step_passes_its_share_of_the_gradient():
    count = torch.tensor([[1.0, -3.0, 0.0]], requires_grad=True)
    ternary = SignedCountToTernary(4)(count)
    assert ternary.tolist() == SignedCountToTernary(4)(count.detach()).tolist()
    upstream = torch.tensor([[4.0, 0, 0], [8.0, 0, 0], [0, 4.0, 0], [0, 0, 1.0]])
    (grad,) = torch.autograd.grad(ternary, count, upstream)
    assert grad.tolist() == [[3.0, 1.0, 0.25]]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_nan_counts_stay_nan(needs_grad):
    count = torch.tensor([[math.nan, 1.0]]).requires_grad_(needs_grad)
    ternary = SignedCountToTernary(2)(count)
    assert ternary[:, 0].isnan().all()
    assert ternary[:, 1].tolist() == [1, 0]
    total = MicroStepSum(2)(ternary)
    assert total[0, 0].isnan()
    assert total[0, 1] == 1


@pytest.mark.parametrize("value", [3.0, -3.0, math.inf, -math.inf])
def test_counts_beyond_the_slots_are_errors(value):
    with pytest.raises(ValueError, match="exceeds max_spike_count=2"):
        SignedCountToTernary(2)(torch.tensor([[0.0, value]]))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_micro_steps_that_do_not_fill_a_step_are_errors(steps):
    with pytest.raises(ValueError, match=f"{steps} micro-steps are no multiple of max_spike_count=3"):
        MicroStepSum(3)(torch.zeros(steps, 4))


@BOTH
@pytest.mark.parametrize("top", [True, 2.0, "2", None])
def test_max_spike_count_is_an_integer(cls, top):
    with pytest.raises(TypeError, match="max_spike_count must be an integer"):
        cls(top)


@BOTH
@pytest.mark.parametrize("top", [0, -1])
def test_max_spike_count_is_positive(cls, top):
    with pytest.raises(ValueError, match="max_spike_count must be at least 1"):
        cls(top)


@BOTH
def test_as_modules(cls):
    module = cls(3)
    assert repr(module) == f"{cls.__name__}(max_spike_count=3)"
    assert module.state_dict() == {}
    assert module.step_mode == "m"
    functional.set_step_mode(module, "m")
    functional.reset_net(module)
    x = counts(3)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


@BOTH
def test_multi_step_only_as_their_counterparts_of_spikingjelly(cls):
    for module in (cls(3), layer.SpikeCountToBinary(3), layer.TemporalBinSum(3)):
        with pytest.raises(ValueError, match="step_mode"):
            functional.set_step_mode(module, "s")


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    net = nn.Sequential(SignedCountToTernary(3), MicroStepSum(3))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    count = counts(3).requires_grad_()
    total = compiled(count)
    assert torch.equal(total, count)
    total.sum().backward()
    assert_close(count.grad, torch.ones_like(count))


def test_the_smallest_int8():
    count = torch.tensor([[-128, 127, 0, -1]], dtype=torch.int8)
    steps = SignedCountToTernary(128)(count)
    assert steps.dtype == torch.int8
    assert torch.equal(steps.sum(0), count[0].long())
    assert steps.unique().tolist() == [-1, 0, 1]
    with pytest.raises(ValueError, match="exceeds max_spike_count=127"):
        SignedCountToTernary(127)(count)


@pytest.mark.parametrize("value", [0.5, -1.25, 3.0000002])
def test_counts_that_are_no_integers(value):
    with pytest.raises(ValueError, match="must be integers"):
        SignedCountToTernary(4)(torch.tensor([[1.0, value]]))
    assert SignedCountToTernary(4)(torch.tensor([[float("nan")]])).isnan().all()


def test_numpys_integers():
    assert SignedCountToTernary(np.int64(4)).max_spike_count == MicroStepSum(np.int32(4)).max_spike_count == 4
