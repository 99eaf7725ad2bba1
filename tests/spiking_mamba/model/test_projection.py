"""One projection: Smoothed Gradient Compensation and thresholds, against formulas worked out by hand."""

import math

import pytest
import torch

import neurons
from neurons.compensation import compensate
from spiking_mamba import SpikingProjection
from spiking_mamba.model.configuration import SGC_FUNCTIONS, SGC_MODES
from spiking_mamba.model.projection import SpikeEncoder
from spiking_mamba.training.distillation import sgc_lambda
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

D = 4
# Away from ties and from the edges of the window: u, the integer nearest to it, the surrogate's slope.
TABLE = [(-9.3, -4, 0), (-4.2, -4, 0), (-2.6, -3, 1), (-0.4, 0, 1), (0.0, 0, 1), (0.7, 1, 1), (3.9, 4, 1)]
SMOOTH = {
    "tanh": lambda u: (D * math.tanh(u), D * (1 - math.tanh(u) ** 2)),
    "scaled_tanh": lambda u: (D * math.tanh(u / D), 1 - math.tanh(u / D) ** 2),
    "clip": lambda u: (max(-D, min(D, u)), 1.0 if abs(u) < D else 0.0),
    "identity": lambda u: (u, 1.0),
}


def by_hand(mode, function, lam, u, spike, slope):
    """Value and derivative of what the weight is applied to."""
    f, df = SMOOTH[function](u)
    return {
        "blend": (spike + lam * (f - spike), (1 - lam) * slope + lam * df),
        "gradient": (spike, slope + lam * df),
        "replace": (spike, (1 - lam) * slope + lam * df),
    }[mode]


def scalar(**arguments):
    """A 1 x 1 projection of weight 1."""
    linear = torch.nn.Linear(1, 1, bias=False)
    projection = SpikingProjection(linear, SpikeEncoder(neurons.SILIFNode(D), **arguments))
    torch.nn.init.ones_(projection.weight)
    return projection.double()


def value_and_slope(projection, u, threshold=1.0):
    x = torch.tensor([[[u * threshold]]], dtype=torch.float64, requires_grad=True)
    y = projection(x)
    y.sum().backward()
    return y.item(), x.grad.item()


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("function", SGC_FUNCTIONS)
@pytest.mark.parametrize("mode", SGC_MODES)
def test_sgc_by_hand(mode, function, lam):
    projection = scalar(sgc={"mode": mode, "function": function, "lam": lam, "schedule": "constant"})
    for u, spike, slope in TABLE:
        wanted = by_hand(mode, function, lam, u, spike, slope)
        assert value_and_slope(projection.train(), u) == pytest.approx(wanted, abs=1e-12)
        assert value_and_slope(projection.eval(), u) == (spike, slope)  # no trace in eval mode
    projection.spikes.sgc_lambda = 0.0
    for u, spike, slope in TABLE:
        assert value_and_slope(projection.train(), u) == (spike, slope)


@pytest.mark.parametrize("mode", SGC_MODES)
def test_sgc_works_in_units_of_the_threshold(mode):
    sgc = {"mode": mode, "function": "scaled_tanh", "lam": 0.3, "schedule": "constant"}
    projection = scalar(sgc=sgc, threshold=0.5).train()
    for u, spike, slope in TABLE:
        value, derivative = by_hand(mode, "scaled_tanh", 0.3, u, spike, slope)
        assert value_and_slope(projection, u, 0.5) == pytest.approx((0.5 * value, derivative), abs=1e-6)


@pytest.mark.parametrize("mode", SGC_MODES)
def test_compensate_keeps_the_dtype_of_the_spikes(mode):
    u = torch.randn(50) * 3
    spike = u.round().clamp(-D, D).bfloat16()
    mixed = compensate(u, spike, mode, "tanh", 0.5, D)
    assert mixed.dtype is torch.bfloat16
    if mode != "blend":
        assert torch.equal(mixed, spike)


def test_lambda_schedules():
    for start in (1.0, 0.6):
        by_hand = [(0, 1, 1), (0.25, 0.75, (1 + 0.5**0.5) / 2), (0.5, 0.5, 0.5), (1, 0, 0)]
        for progress, linear, cosine in by_hand:
            assert sgc_lambda("linear", start, progress) == pytest.approx(start * linear)
            assert sgc_lambda("cosine", start, progress) == pytest.approx(start * cosine, abs=1e-12)
            assert sgc_lambda("constant", start, progress) == start


def test_sgc_of_a_whole_model_is_set_and_switched_off():
    model = tiny_model(neuron=INTEGER, sgc={"mode": "blend", "lam": 0.75}).train()
    plain = tiny_model(neuron=INTEGER).train()
    ids = tokens(2, 6)
    assert model.sgc_lambda == 0.75
    assert not torch.allclose(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits)
    model.train().set_sgc_lambda(0.0)
    assert model.sgc_lambda == 0.0
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert plain.sgc_lambda == 0.0


# --- thresholds ---


def test_threshold_scales_the_result_not_the_spikes():
    """``y = V W S(x / V) + b`` with the integers recomputed here."""
    projection = SpikingProjection(torch.nn.Linear(8, 5), SpikeEncoder(neurons.SILIFNode(D), threshold=0.3))
    x = torch.randn(2, 7, 8)
    u = x / 0.3
    spike = (u.sign() * (u.abs() - 0.5).ceil()).clamp(-D, D)
    assert spike.abs().max() == D
    wanted = 0.3 * (spike @ projection.weight.T) + projection.linear.bias
    assert torch.allclose(projection(x), wanted, atol=1e-6)


def test_gradient_of_a_learned_threshold_by_hand():
    """With y = V w s(x / V): dy/dlogV = V w s - w s'(x / V) x."""
    for u, spike, slope in TABLE:
        projection = scalar(threshold=0.5, learn_threshold=True)
        torch.nn.init.constant_(projection.weight, 1.7)
        projection.spikes.log_threshold.data = torch.tensor([math.log(0.5)])
        x = 0.5 * u
        projection(torch.tensor([[[x]]], dtype=torch.float64)).sum().backward()
        assert projection.spikes.log_threshold.grad.item() == pytest.approx(
            1.7 * (0.5 * spike - slope * x), abs=1e-5
        )


def test_gradient_of_a_learned_threshold_by_finite_differences():
    """The surrogate's primitive in place of the step makes the projection differentiable."""
    torch.manual_seed(0)  # a difference close to 0 would say nothing of its gradient
    smooth = neurons.SignedSpikeCount(D, alpha=0.7, grad_window=3.0, spiking=False)
    x, weight = torch.randn(2, 6, 5, dtype=torch.float64) * 2, torch.randn(2, 6, 3, dtype=torch.float64)
    node = neurons.SILIFNode(D, surrogate_function=smooth)
    encoder = SpikeEncoder(node, threshold=0.6, learn_threshold=True)
    projection = SpikingProjection(torch.nn.Linear(5, 3, bias=False), encoder).double()

    def loss(log_threshold):
        projection.spikes.log_threshold.data = torch.tensor([log_threshold])
        return (projection(x) * weight).sum()

    at, step = math.log(0.6), 1e-2
    loss(at).backward()
    difference = (loss(at + step) - loss(at - step)).item() / (2 * step)
    assert abs(difference) > 0.1
    assert projection.spikes.log_threshold.grad.item() == pytest.approx(difference, rel=2e-3)


def test_thresholds_per_projection_and_per_layer():
    both = tiny_model(neuron=INTEGER, threshold={"in_proj": 0.5, "out_proj": 2})
    layered = tiny_model(neuron=INTEGER, threshold=[0.25, {"in_proj": 0.5, "out_proj": 0.125}])
    for model, wanted in ((both, [0.5, 2.0, 0.5, 2.0]), (layered, [0.25, 0.25, 0.5, 0.125])):
        assert [p.threshold for p in model.projections().values()] == wanted
    learned = tiny_model(neuron=INTEGER, threshold=[0.25, 0.7], learn_threshold=True)
    values = [p.threshold.item() for p in learned.projections().values()]
    assert values == pytest.approx([0.25, 0.25, 0.7, 0.7])


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_a_learned_threshold_starts_as_the_fixed_one(membrane):
    ids, fields = tokens(2, 9), {"neuron": LEAKY, "membrane": membrane, "threshold": 0.5}
    fixed, learned = tiny_model(**fields), tiny_model(**fields, learn_threshold=True)
    assert torch.allclose(fixed(ids).logits, learned(ids).logits, atol=1e-5)
    learned(ids, labels=ids).loss.backward()
    for projection in learned.projections().values():
        assert projection.spikes.log_threshold.dtype is torch.float32
        assert projection.spikes.log_threshold.grad.abs() > 0


def test_a_dense_projection_is_a_linear_layer():
    linear, x = torch.nn.Linear(4, 3), torch.randn(2, 5, 4)
    assert torch.equal(SpikingProjection(linear, SpikeEncoder())(x), linear(x))
