"""The equations: against voltages worked out by hand, exact arithmetic and every bit pattern."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from neurons import SignedSpikeCount
from neurons.functional import clip, si_lif_multi_step, si_lif_step

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def exact_count(x: np.ndarray, max_spike_count: int) -> np.ndarray:
    """The spike count by its definition, in float64, where floor and the fraction of every float32 are
    exact: the whole part of |x|, one more if the fraction is strictly past a half, at most D."""
    with np.errstate(invalid="ignore"):  # inf - inf
        whole = np.floor(np.abs(x))
        past_half = np.abs(x) - whole > 0.5
        return np.sign(x) * np.minimum(whole + past_half, max_spike_count)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in value (so 0 == -0), NaN where the other is NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# --- the theorem -------------------------------------------------------------------------------------------


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def near_ties() -> torch.Tensor:
    """Every float32 within 100 units in the last place of 0.5, 1.5, .. 9.5 and of 1, 2, .. 9."""
    points = torch.arange(1, 20) / 2.0
    bits = points.view(torch.int32)[:, None] + torch.arange(-100, 101, dtype=torch.int32)
    positive = bits.flatten().view(torch.float32)
    return torch.cat([positive, -positive])


def check_theorem(x: torch.Tensor) -> None:
    micro = torch.zeros(8, len(x), dtype=x.dtype)
    micro[0] = x  # the input at the first micro-step only
    ternary, _, potentials = si_lif_multi_step(micro, 0.0, math.inf, 1.0, SignedSpikeCount(1), False, True)
    assert bool((ternary.isnan() | (ternary.abs() <= 1)).all())
    exact = x.double()
    on_tie = (exact.abs() % 1 == 0.5).numpy()
    for max_spike_count in (1, 2, 4, 8):
        count, v = si_lif_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(max_spike_count))
        oracle = exact_count(exact.numpy(), max_spike_count)
        expected = torch.from_numpy(oracle)
        assert same(count, expected)
        assert same(ternary[:max_spike_count].float().sum(0), expected)
        # Everywhere but on exact ties that is numpy's rounding to the nearest.
        rounded = np.clip(np.rint(exact.numpy()), -max_spike_count, max_spike_count)
        np.testing.assert_array_equal(oracle[~on_tie], rounded[~on_tie])
        small = exact.abs() <= 2**24
        residue = (exact - expected)[small]
        assert torch.equal(v[small].double(), residue)
        assert torch.equal(potentials[max_spike_count - 1, small].double(), residue)


@pytest.mark.parametrize("dtype", HALVES)
def test_ternary_micro_steps_sum_to_the_integer_for_every_half_precision_input(dtype):
    x = every_pattern(dtype)
    assert x.isnan().any()
    assert x.isinf().sum() == 2
    check_theorem(x)


@pytest.mark.parametrize("chunk", range(10))
def test_ternary_micro_steps_sum_to_the_integer_for_ten_million_random_float32_patterns(chunk):
    bits = np.random.default_rng(chunk).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    check_theorem(torch.from_numpy(bits.view(np.float32)))


def test_ternary_micro_steps_sum_to_the_integer_near_every_tie():
    check_theorem(near_ties())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_non_finite_inputs(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype)
    spike, v = si_lif_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(4))
    assert spike[0].isnan()
    assert spike[1:].tolist() == [4, -4, 1]  # a NaN stays in its own element
    assert v[0].isnan()
    assert v[1:].tolist() == [math.inf, -math.inf, 0]


# --- spikes and voltages by hand ---------------------------------------------------------------------------

BY_HAND = [  # u, and S for D = 3: ties go towards zero
    (0.0, 0), (0.25, 0), (0.5, 0), (0.5000001, 1), (1.0, 1), (1.5, 1), (1.5000001, 2), (2.5, 2), (2.51, 3),
    (3.5, 3), (3.51, 3), (1e30, 3), (1e-45, 0),
]  # fmt: skip


@pytest.mark.parametrize(("u", "count"), BY_HAND)
def test_spike_count_by_hand(u, count):
    x = torch.tensor([u, -u])
    spike, v = si_lif_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(3))
    assert spike.tolist() == [count, -count]
    assert v.tolist() == (x - torch.tensor([count, -count])).tolist()


def test_threshold_scales_the_quantum():
    # V_th = 0.25: u = 4 x = 2.48, 2.52, -4.8; V = x - 0.25 S
    x = torch.tensor([0.62, 0.63, -1.2], dtype=torch.float64)
    spike, v = si_lif_step(x, 0.0, math.inf, 0.25, SignedSpikeCount(4))
    assert spike.tolist() == [2, 3, -4]
    assert_close(v, torch.tensor([0.12, -0.12, -0.2], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_leaky_sequence_with_resets_by_hand(dtype):
    # tau = 4 (beta = 3/4), V_th = 1/2 (u = 2 H), D = 2, V[0] = 0; every number is a sum of few powers of two
    #   X        H = 3/4 V + X                         u          S   V = H - S/2
    #   0.75     0.75                                  1.5        1   0.25            a tie goes towards zero
    #   0.25     0.1875 + 0.25     =  0.4375           0.875      1  -0.0625
    #  -0.25    -0.046875 - 0.25   = -0.296875        -0.59375   -1   0.203125
    #   2.0      0.15234375 + 2    =  2.15234375       4.3046875  2   1.15234375      clipped at D
    #   0.0      0.8642578125                          1.7285..   2  -0.1357421875    the rest fires later
    #   0.0     -0.101806640625                       -0.2036..   0  -0.101806640625
    x = torch.tensor([0.75, 0.25, -0.25, 2.0, 0.0, 0.0], dtype=dtype).unsqueeze(1)
    spike, v, v_seq = si_lif_multi_step(x, 0.0, 4.0, 0.5, SignedSpikeCount(2), store_v_seq=True)
    assert spike[:, 0].tolist() == [1, 1, -1, 2, 2, 0]
    assert v_seq[:, 0].tolist() == [0.25, -0.0625, 0.203125, 1.15234375, -0.1357421875, -0.101806640625]
    assert v.tolist() == [-0.101806640625]


def test_leaky_sequence_from_an_initial_potential_by_hand():
    # tau = 10/3 (beta = 0.7), V_th = 0.8, D = 3, V[0] = -1
    #   X        H = 0.7 V + X                     u = H/0.8    S   V = H - 0.8 S
    #   1.0     -0.7 + 1              =  0.3       0.375        0   0.3
    #   0.5      0.21 + 0.5           =  0.71      0.8875       1  -0.09
    #   3.5     -0.063 + 3.5          =  3.437     4.29625      3   1.037
    #  -2.0      0.7259 - 2           = -1.2741   -1.592625    -2   0.3259
    #   0.0      0.22813              =  0.22813   0.2851625    0   0.22813
    x = torch.tensor([1.0, 0.5, 3.5, -2.0, 0.0], dtype=torch.float64).unsqueeze(1)
    start = torch.tensor([-1.0], dtype=torch.float64)
    spike, _, v_seq = si_lif_multi_step(x, start, 10 / 3, 0.8, SignedSpikeCount(3), store_v_seq=True)
    assert spike[:, 0].tolist() == [0, 1, 3, -2, 0]
    assert_close(v_seq[:, 0], torch.tensor([0.3, -0.09, 1.037, 0.3259, 0.22813], dtype=torch.float64))


def test_random_sequences_equal_exact_rational_arithmetic():
    rng = np.random.default_rng(0)
    x = rng.integers(-300, 301, (40, 25)) / 128  # dyadic, so that float64 holds them exactly
    tau, threshold, top = Fraction(10, 3), Fraction(3, 8), 4
    spikes, potentials = np.zeros(x.shape), np.zeros(x.shape)
    for n in range(x.shape[1]):
        v = Fraction(0)
        for t in range(x.shape[0]):
            h = (1 - 1 / tau) * v + Fraction(x[t, n])
            u = abs(h) / threshold
            whole = u.numerator // u.denominator
            s = min(top, whole + (u - whole > Fraction(1, 2))) * (1 if h > 0 else -1)
            v = h - threshold * s
            spikes[t, n], potentials[t, n] = s, float(v)
    got, _, v_seq = si_lif_multi_step(
        torch.from_numpy(x), 0.0, float(tau), float(threshold), SignedSpikeCount(top), store_v_seq=True
    )
    np.testing.assert_array_equal(got.numpy(), spikes)
    np.testing.assert_allclose(v_seq.numpy(), potentials, rtol=0, atol=1e-13)
    assert (np.abs(spikes) == top).any()
    assert (spikes == 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tau", "threshold"), [(math.inf, 0.3), (2.0, 0.1), (10 / 3, 3.0), (1.7, 1.0)])
def test_every_operation_is_rounded_to_float32_once(dtype, tau, threshold):
    # numpy float32, one rounding an operation: no contracted multiply-add, no reciprocal, no half precision.
    torch.manual_seed(0)
    x = (2 * threshold * torch.randn(12, 4096)).to(dtype)
    start = threshold * torch.randn(4096)
    beta, quantum, v = np.float32(1 - 1 / tau), np.float32(threshold), start.numpy()
    spike, last, v_seq = si_lif_multi_step(x, start, tau, threshold, SignedSpikeCount(4), store_v_seq=True)
    for t in range(len(x)):
        h = beta * v + x[t].float().numpy()
        s = exact_count((h / quantum).astype(np.float64), 4).astype(np.float32)
        v = h - quantum * s
        assert v.dtype == np.float32
        np.testing.assert_array_equal(spike[t].float().numpy(), s)
        np.testing.assert_array_equal(v_seq[t].numpy(), v)
    assert torch.equal(last, v_seq[-1])


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 1.3])
def test_dividing_by_the_threshold_is_a_true_division(threshold):
    # Around the ties the product with the rounded reciprocal, 1/V_th, gives other spikes.
    quantum = np.float32(threshold)
    ties = torch.from_numpy(quantum * (np.arange(4096, dtype=np.float32) + np.float32(0.5)))
    bits = ties.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    x = bits.flatten().view(torch.float32)
    top = 2**13
    spike, _ = si_lif_step(x, 0.0, math.inf, threshold, SignedSpikeCount(top))
    expected = exact_count((x.numpy() / quantum).astype(np.float64), top)
    np.testing.assert_array_equal(spike.numpy(), expected)
    product = exact_count((x.numpy() * (np.float32(1) / quantum)).astype(np.float64), top)
    assert (product != expected).sum() > 100


# --- properties --------------------------------------------------------------------------------------------


def test_without_a_leak_nothing_is_lost():
    # sum X = V[T] + V_th sum S, exactly, on a grid on which every sum is exact
    torch.manual_seed(0)
    x = torch.randint(-64, 65, (50, 2000)) / 16.0
    spike, v, _ = si_lif_multi_step(x, 0.0, math.inf, 0.25, SignedSpikeCount(4))
    assert torch.equal(v + 0.25 * spike.sum(0), x.sum(0))


def test_sign_symmetry_bounds_and_residue():
    torch.manual_seed(0)
    x = 3 * torch.randn(30, 2000)
    spike, v, v_seq = si_lif_multi_step(x, 0.0, 3.0, 0.7, SignedSpikeCount(4), store_v_seq=True)
    mirrored, v_mirrored, _ = si_lif_multi_step(-x, 0.0, 3.0, 0.7, SignedSpikeCount(4))
    assert torch.equal(mirrored, -spike)
    assert torch.equal(v_mirrored, -v)
    assert spike.min() == -4
    assert spike.max() == 4
    assert torch.equal(spike, spike.round())
    unclipped = spike.abs() < 4
    assert bool((v_seq[unclipped].abs() <= 0.35 + 1e-6).all())  # half a quantum is left at most


def test_count_never_falls_as_the_input_grows():
    x = torch.linspace(-6, 6, 100_001)
    spike, _ = si_lif_step(x, 0.0, math.inf, 0.9, SignedSpikeCount(5))
    assert bool((spike.diff() >= 0).all())
    assert spike.unique().tolist() == list(range(-5, 6))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_number_zero_is_a_potential_of_zeros(dtype):
    x = torch.randn(5, 100, dtype=torch.float64).to(dtype)
    for tau in (math.inf, 2.0):
        expected = si_lif_multi_step(x, torch.zeros(100), tau, 0.7, SignedSpikeCount(2), store_v_seq=True)
        got = si_lif_multi_step(x, 0.0, tau, 0.7, SignedSpikeCount(2), store_v_seq=True)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_multi_step_is_the_single_step_repeated():
    torch.manual_seed(0)
    x, v = torch.randn(6, 3, 5), torch.randn(3, 5)
    got = si_lif_multi_step(x, v, 1.5, 0.6, SignedSpikeCount(3), store_v_seq=True)
    spikes, potentials = [], []
    for step in x:
        s, v = si_lif_step(step, v, 1.5, 0.6, SignedSpikeCount(3))
        spikes.append(s)
        potentials.append(v)
    assert torch.equal(got[0], torch.stack(spikes))
    assert torch.equal(got[1], v)
    assert torch.equal(got[2], torch.stack(potentials))


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detach_reset", "x1", "expected_v", "expected_x"),
    [
        # V_th = 1/2, alpha = 1/4, window 2, tau = 4 (beta = 3/4); L = S1 + 10 S2 + 100 V2.
        # Inside the window dS/dH = alpha / V_th = 1/2 and dV/dH = 1 - V_th/2 = 3/4.
        #   dL/dH2 = 10/2 + 100 * 3/4 = 80; dL/dV1 = 60; dL/dH1 = 1/2 + 60 * 3/4 = 45.5; dL/dV0 = 34.125
        (False, 0.3, 34.125, [45.5, 80.0]),
        # Reset detached, dV/dH = 1: 10/2 + 100 = 105; 78.75; 1/2 + 78.75 = 79.25; 59.4375
        (True, 0.3, 59.4375, [79.25, 105.0]),
        # X1 = 1.25: u = 2.5 is outside the window, dS1 = 0 and dV1/dH1 = 1: dL/dH1 = 60
        (False, 1.25, 45.0, [60.0, 80.0]),
        # ... and X1 = 1: u = 2 is on its edge, which belongs to it
        (False, 1.0, 34.125, [45.5, 80.0]),
    ],
)
def test_gradients_by_hand(detach_reset, x1, expected_v, expected_x):
    x = torch.tensor([[x1], [0.2]], requires_grad=True)
    v = torch.zeros(1, requires_grad=True)
    surrogate = SignedSpikeCount(4, alpha=0.25, grad_window=2.0)
    spike, last, _ = si_lif_multi_step(x, v, 4.0, 0.5, surrogate, detach_reset)
    (spike[0] + 10 * spike[1] + 100 * last).sum().backward()
    assert v.grad.tolist() == [expected_v]
    assert x.grad[:, 0].tolist() == expected_x


def straight_through(x_seq, v, tau, threshold, top, alpha, window, detach_reset):
    """The same neuron in plain autograd: the value of S is a constant, its slope that of a clamp."""
    spikes, potentials = [], []
    for x in x_seq:
        h = (1 - 1 / tau) * v + x
        u = h / threshold
        value = torch.from_numpy(exact_count(u.detach().double().numpy(), top)).to(u.dtype)
        line = alpha * u.clamp(-window, window)
        s = value + (line - line.detach())
        v = h - threshold * (value if detach_reset else s)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), v, torch.stack(potentials)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    ("tau", "threshold", "top", "alpha", "window"),
    [(math.inf, 1.0, 4, 1.0, 4.0), (2.0, 0.5, 2, 0.6, 1.3), (10 / 3, 0.8, 1, 1.7, 2.5)],
)
def test_gradients_equal_plain_autograd(dtype, detach_reset, steps, tau, threshold, top, alpha, window):
    torch.manual_seed(steps)
    x = (2 * top * threshold * torch.randn(steps, 500, dtype=dtype)).requires_grad_()
    v = torch.randn(500, dtype=dtype, requires_grad=True)
    weights = [torch.randn(steps, 500, dtype=dtype) for _ in range(2)] + [torch.randn(500, dtype=dtype)]

    def gradients(outputs):
        spike, last, v_seq = outputs
        loss = (weights[0] * spike).sum() + (weights[1] * v_seq).sum() + (weights[2] * last).sum()
        return torch.autograd.grad(loss, [x, v])

    expected = straight_through(x, v, tau, threshold, top, alpha, window, detach_reset)
    got = si_lif_multi_step(
        x, v, tau, threshold, SignedSpikeCount(top, alpha, window), detach_reset, store_v_seq=True
    )
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, **tolerance)
    for a, b in zip(gradients(got), gradients(expected), strict=True):
        assert_close(a, b, **tolerance)
    u = x.detach() / threshold
    assert (u.abs() > window).any()  # the case has both sides of the window
    assert (u.abs() < window).any()


@pytest.mark.parametrize("detach_reset", [False, True])
def test_gradients_of_no_steps(detach_reset):
    x = torch.zeros(0, 3, requires_grad=True)
    v = torch.ones(3, requires_grad=True)
    spike, last, _ = si_lif_multi_step(x, v, 2.0, 0.5, SignedSpikeCount(2), detach_reset)
    x_grad, v_grad = torch.autograd.grad(spike.sum() + (3 * last).sum(), [x, v])
    assert x_grad.shape == (0, 3)
    assert v_grad.tolist() == [3, 3, 3]  # V[0] passes through untouched
    si_lif_multi_step(x, 0.0, 2.0, 0.5, SignedSpikeCount(2))[0].sum().backward()
    assert x.grad.shape == (0, 3)


def test_gradient_is_zero_at_non_finite_inputs():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], requires_grad=True)
    si_lif_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(4))[0].sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_are_computed_in_float32(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 200).to(dtype)
    grads = []
    for cast in (dtype, torch.float32):
        y = x.to(cast, copy=True).requires_grad_()
        spike, v, _ = si_lif_multi_step(y, 0.0, 2.0, 0.7, SignedSpikeCount(2, alpha=0.3))
        (spike.float().sum() + (3.3 * v).sum()).backward()
        assert y.grad.dtype == cast
        grads.append(y.grad)
    assert torch.equal(grads[0], grads[1].to(dtype))


# --- the precision contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes(dtype):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    for start in (0.0, torch.zeros(3, dtype=dtype)):
        spike, v, v_seq = si_lif_multi_step(
            torch.ones(2, 3, dtype=dtype), start, 2.0, 0.3, SignedSpikeCount(4), store_v_seq=True
        )
        assert (spike.dtype, v.dtype, v_seq.dtype) == (dtype, state, state)


@pytest.mark.parametrize(
    ("dtype", "tiny", "fires"),
    [
        # 1/2 + tiny is strictly past the tie, but not a value of the input's own dtype ...
        (torch.bfloat16, 2.0**-9, True),
        (torch.float16, 2.0**-12, True),
        (torch.float64, 2.0**-25, True),
        (torch.float32, 2.0**-25, False),  # ... nor, here, of the float32 potential: it rounds to 1/2
    ],
)
def test_precision_of_the_potential(dtype, tiny, fires):
    x = torch.tensor([[tiny], [0.5]], dtype=dtype)
    assert x.dtype == torch.float64 or (x[0] + x[1]).item() == 0.5
    spike, v, _ = si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(4))
    assert spike[:, 0].tolist() == [0, int(fires)]
    assert v.item() == (0.5 + tiny - 1 if fires else 0.5)


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_spikes_have_the_dtype_of_autocast(dtype, autocast):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 300)).to(dtype)
    expected = si_lif_multi_step(x, 0.0, 2.0, 0.7, SignedSpikeCount(4), store_v_seq=True)
    with torch.autocast("cpu", autocast):
        spike, v, v_seq = si_lif_multi_step(x, 0.0, 2.0, 0.7, SignedSpikeCount(4), store_v_seq=True)
        none, _, _ = si_lif_multi_step(x[:0], 0.0, 2.0, 0.7, SignedSpikeCount(4))
    assert spike.dtype == none.dtype == (torch.float64 if dtype == torch.float64 else autocast)
    assert torch.equal(spike, expected[0].to(spike.dtype))  # the values are those without autocast
    assert torch.equal(v, expected[1])
    assert torch.equal(v_seq, expected[2])


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_input_is_never_modified(dtype, threshold):
    torch.manual_seed(0)
    x, v = torch.randn(3, 50).to(dtype), torch.randn(50).to(dtype)
    x_before, v_before = x.clone(), v.clone()
    for start in (0.0, v):
        spike, last, _ = si_lif_multi_step(x, start, math.inf, threshold, SignedSpikeCount(2))
        spike.zero_()  # nor do the results share its memory
        last.zero_()
        spike, last = si_lif_step(x[0], start, math.inf, threshold, SignedSpikeCount(2))
        spike.zero_()
        last.zero_()
    assert torch.equal(x, x_before)
    assert torch.equal(v, v_before)
    assert (x._version, v._version) == (0, 0)


def test_strided_and_expanded_inputs():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5).transpose(1, 2)
    expected = si_lif_multi_step(x.contiguous(), 0.0, 2.0, 0.5, SignedSpikeCount(2))
    got = si_lif_multi_step(x, 0.0, 2.0, 0.5, SignedSpikeCount(2))
    assert torch.equal(got[0], expected[0])
    one = torch.tensor([0.8]).expand(4, 3)
    assert si_lif_multi_step(one, 0.0, math.inf, 1.0, SignedSpikeCount(2))[0].sum(0).tolist() == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("steps", [0, 2])
def test_other_inputs_are_type_errors(dtype, steps):
    x = torch.ones(steps, 3).to(dtype)
    with pytest.raises(TypeError, match="floating-point"):
        si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(2))
    with pytest.raises(TypeError, match="floating-point"):
        si_lif_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (0,), (0, 2, 0), (3, 0), (2, 4, 0), (2,)])
def test_empty_and_small_shapes(dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    spike, v, v_seq = si_lif_multi_step(x, 0.0, 2.0, 0.5, SignedSpikeCount(2), store_v_seq=True)
    assert (spike.shape, v.shape, v_seq.shape) == (x.shape, x.shape[1:], x.shape)
    assert spike.dtype == dtype
    assert v.dtype == v_seq.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert shape[0] or not v.any()
    start = torch.full(shape[1:], 0.25, dtype=dtype)
    last = si_lif_multi_step(x[:0], start, 2.0, 0.5, SignedSpikeCount(2))[1]
    assert torch.equal(last, start.to(v.dtype))  # no steps, no leak


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    # the integers of a dtype without gaps; for float32 the count is computed as ceil(|u| - 1/2) in float32,
    # which is exact up to 2**23
    [(torch.bfloat16, 2**8), (torch.float16, 2**11), (torch.float32, 2**23)],
)
def test_largest_exact_count(dtype, largest, steps):
    x = torch.tensor([largest - 1.0, largest]).to(dtype).expand(steps, 2)
    spike, _, _ = si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(largest))
    assert spike.tolist() == x.tolist()  # bfloat16 has 255 and 256
    with pytest.raises(ValueError, match="not exact"):
        si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(largest + 1))


@pytest.mark.parametrize("steps", [0, 1])
def test_largest_exact_count_under_autocast(steps):
    x = torch.full((steps, 1), 300.0)
    assert si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(300))[0].sum() == 300 * steps
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"max_spike_count=300 is not exact in torch\.bfloat16"),
    ):
        si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount(300))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_clip_has_its_slope_on_the_bounds_too(dtype):
    nan, inf = math.nan, math.inf
    u = torch.tensor([-inf, -4.0, -3.0, -0.5, 0.0, 2.0, 3.0, 3.5, inf, nan], dtype=dtype, requires_grad=True)
    out = clip(u, 3.0)
    expected = torch.tensor([-3.0, -3.0, -3.0, -0.5, 0.0, 2.0, 3.0, 3.0, 3.0, nan], dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    out.sum().backward()
    assert u.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
