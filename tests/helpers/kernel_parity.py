"""What a kernel must equal: shared by the tests that run it on the CPU and those that run it on a GPU."""

import math
from dataclasses import dataclass

import torch

from neurons import SignedSpikeCount, compensation, functional
from neurons.cupy.si_lif import ops

# Gradients may differ from the oracle's by that much of the largest: 1e-6, or one unit in the last place.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same dtype, shape and bits; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integers = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = actual.contiguous().view(integers) == expected.contiguous().view(integers)
    differ = ~(same | (actual.isnan() & expected.isnan()))
    where = differ.nonzero()[:5].tolist() if bool(differ.any()) else []
    assert not where, (
        f"{int(differ.sum())} differ, first at {where}: {actual[differ][:5]} {expected[differ][:5]}"
    )


def assert_gradients_agree(
    actual: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float | None = None
) -> None:
    """Errors relative to the largest gradient; ``tolerance``: GRADIENT_TOLERANCE of the dtype."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert_bit_equal(actual[~finite], expected[~finite])
    if bool(finite.any()):
        error = (actual[finite].double() - expected[finite].double()).abs().max()
        largest = expected[finite].double().abs().max()
        tolerance = GRADIENT_TOLERANCE[actual.dtype] if tolerance is None else tolerance
        assert error <= tolerance * largest, f"off by {error} of {largest}"


@dataclass
class Case:
    """One call of a multi-step neuron and the gradients that flow back into it."""

    T: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    spike_dtype: torch.dtype | None = None  # autocast's
    tau: float = math.inf
    v_threshold: float = 1.0
    max_spike_count: int = 4
    alpha: float = 1.0
    grad_window: float | None = None
    detach_reset: bool = False
    initial_v: bool = False
    store_v_seq: bool = False
    specials: bool = False  # NaN, infinities, subnormals among the inputs
    contiguous: bool = True
    offset: int = 0  # elements by which the input's storage is shifted off its alignment
    grad_spike: bool = True
    grad_v: bool = True
    seed: int = 0


# By name, what a case may differ in.
VARIANTS = {
    "specials": {"specials": True},
    "specials_leak": {"specials": True, "tau": 3.0, "initial_v": True, "v_threshold": 0.3},
    "v_seq": {"store_v_seq": True, "initial_v": True, "tau": 3.0},
    "v_seq_threshold": {"store_v_seq": True, "v_threshold": 1.7},
    "only_v": {"grad_spike": False, "initial_v": True, "tau": 10.0},
    "only_spikes": {"grad_v": False, "initial_v": True, "tau": 10.0},
    "strided": {"contiguous": False},
    "misaligned": {"offset": 3},
    "surrogate": {"alpha": 0.7, "grad_window": 1.25, "max_spike_count": 8, "tau": 3.0},
    "ternary": {"max_spike_count": 1, "initial_v": True},
}


def draw(case: Case, device: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Values around the quanta, a quarter of them exactly on ties or integers."""
    generator = torch.Generator().manual_seed(case.seed + sum(shape))  # the same on every device
    numel = math.prod(shape)
    x = torch.randn(numel, generator=generator) * scale
    snapped = (x / (case.v_threshold / 2)).round() * (case.v_threshold / 2)
    x = torch.where(torch.rand(numel, generator=generator) < 0.25, snapped, x)
    return x.to(dtype).view(shape).to(device)


def make_input(case: Case, device: str) -> torch.Tensor:
    shape = (case.T, *case.shape)
    x = draw(case, device, shape, case.dtype, 2.0 * case.v_threshold)
    if case.specials:
        values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-42, 6e-8, 3e38, -65504.0]
        flat = x.view(-1)
        index = torch.arange(0, flat.numel(), 7, device=device)
        flat[index] = torch.tensor(values, device=device).to(case.dtype)[index % len(values)]
    if not case.contiguous:  # as a transposed view, one element in between
        wide = x.new_zeros(*shape[:-1], 2 * shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if case.offset:
        storage = x.new_zeros(x.numel() + case.offset)
        storage[case.offset :] = x.view(-1)
        return storage[case.offset :].view(shape)
    return x


def run(function, case: Case, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """``(outputs, gradients to the input and the initial potential)`` of one implementation."""
    x = make_input(case, device).requires_grad_()
    v = None
    if case.initial_v:
        v = draw(case, device, case.shape, torch.float32, case.v_threshold).requires_grad_()
    with torch.autocast(torch.device(device).type, case.spike_dtype, enabled=case.spike_dtype is not None):
        spike, v_out, v_seq = function(
            x,
            0.0 if v is None else v,
            case.tau,
            case.v_threshold,
            SignedSpikeCount(case.max_spike_count, case.alpha, case.grad_window),
            case.detach_reset,
            case.store_v_seq,
        )
    outputs = [spike, v_out] if v_seq is None else [spike, v_out, v_seq]
    wanted = [case.grad_spike, case.grad_v] + [case.store_v_seq] * (len(outputs) - 2)
    sources = [o for o, want in zip(outputs, wanted, strict=True) if want and o.requires_grad]
    grads = [draw(case, device, tuple(o.shape), torch.float32, 1.0).to(o.dtype) for o in sources]
    assert_bit_equal(x.detach(), make_input(case, device))  # never modified
    inputs = [x] if v is None else [x, v]
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    if sources:
        gradients = list(torch.autograd.grad(sources, inputs, grads, allow_unused=True))
    return [o.detach() for o in outputs], gradients


def check_multi_step(case: Case, device: str, oracle_device: str | None = None) -> None:
    """The kernels against ``neurons.functional``: outputs to the bit, gradients within the tolerance."""
    expected, expected_gradients = run(functional.si_lif_multi_step, case, oracle_device or device)
    actual, gradients = run(ops.si_lif_multi_step, case, device)
    for a, e in zip(actual, expected, strict=True):
        assert_bit_equal(a, e.to(device))
    for a, e in zip(gradients, expected_gradients, strict=True):
        if e is None and a is not None:  # torch returns no gradient where nothing can reach the input
            e = torch.zeros_like(a)
        assert_gradients_agree(a, e if e is None else e.to(device))


def check_count(x: torch.Tensor, v_threshold: float, surrogate: SignedSpikeCount) -> None:
    """The stateless operator against one step of ``neurons.functional``."""
    x = x.detach().requires_grad_()
    actual = ops.signed_spike_count(x, v_threshold, surrogate)
    expected, _ = functional.si_lif_step(x, 0.0, math.inf, v_threshold, surrogate)
    assert_bit_equal(actual.detach(), expected.detach())
    grad = torch.randn(x.shape, device=x.device).to(expected.dtype)
    assert_gradients_agree(torch.autograd.grad(actual, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def check_compensated(
    u: torch.Tensor,
    surrogate: SignedSpikeCount,
    mode: str,
    function: str,
    lam: float,
    wants_spike: bool = True,
) -> None:
    """The compensated operator: spikes to the bit; mixture and gradient within the tolerance of what torch
    makes of it all in float32."""
    x = u.detach().requires_grad_()
    spike, mixed = ops.compensated_spike_count(x, surrogate, mode, function, lam)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(u.shape, generator=generator).to(spike.detach()) for _ in range(2 if wants_spike else 1)
    ]
    (grad,) = torch.autograd.grad((mixed, spike)[: len(grads)], x, grads)
    wide = u.detach().float().requires_grad_()
    with torch.autocast(u.device.type, enabled=False):
        exact, smooth = compensation.compensated_spike_count(wide, surrogate, mode, function, lam)
        wide_grads = [g.float() for g in grads]
        (expected,) = torch.autograd.grad((smooth, exact)[: len(grads)], wide, wide_grads)
    assert_bit_equal(spike.detach(), exact.detach().to(spike.dtype))
    for a, e in ((mixed.detach(), smooth.detach()), (grad, expected)):  # tanh: another rounding may differ
        assert_gradients_agree(a, e.to(a.dtype), max(1e-6, torch.finfo(a.dtype).eps))
