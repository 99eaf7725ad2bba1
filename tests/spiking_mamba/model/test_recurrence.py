"""The fast paths against the recurrence as text."""

import pytest
import torch

from spiking_mamba.model import scan
from spiking_mamba.model.recurrence import recurrence


def draw(length, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads, P, N = 4, 6, 5

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tensors = normal(2, length, heads, P), normal(2, length, heads), -normal(heads).exp()
    return *tensors, normal(2, length, groups, N), normal(2, length, groups, N), normal(heads), normal(heads)


def test_one_token_by_hand():
    """softplus(0) = ln 2, so the decay is 2^A: state 0.25 * 8 + ln 2 * 3 * 5, output 7 times it, and D x."""
    one = torch.tensor
    y, state = recurrence(
        one([[[[3.0]]]]), one([[[0.0]]]), one([-2.0]), one([[[[5.0]]]]), one([[[[7.0]]]]),
        one([0.5]), one([0.0]), (0.0, 9.0), one([[[[8.0]]]]),
    )  # fmt: skip
    expected = 2.0 + 15 * 0.6931471805599453
    assert state.item() == pytest.approx(expected)
    assert y.item() == pytest.approx(7 * expected + 1.5)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 1.0)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_the_scan_and_its_gradients(length, groups, limit):
    *inputs, D, bias = draw(length, groups)
    first = torch.randn(2, 4, 6, 5)
    tensors = [t.requires_grad_() for t in (*inputs, D, bias, first)]
    x, dt, A, B, C, D, bias, first = tensors
    y, state = scan.chunk_scan(
        x, dt, A, B, C, chunk_size=16, D=D, dt_bias=bias, dt_limit=limit, initial_states=first,
        return_final_states=True,
    )  # fmt: skip
    by_text = recurrence(x, dt, A, B, C, D, bias, limit, first)
    for found, expected in zip((y, state), by_text, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(y), torch.randn_like(state)
    losses = [
        sum((w * o).sum() for w, o in zip(weights, outs, strict=True)) for outs in ((y, state), by_text)
    ]
    gradients = [torch.autograd.grad(loss, tensors, retain_graph=True) for loss in losses]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_token_by_token():
    x, dt, A, B, C, D, bias = draw(9, 2)
    state = torch.zeros(2, 4, 6, 5)
    expected, last = recurrence(x, dt, A, B, C, D, bias, (0.0, 9.0), state.clone())
    steps = [
        scan.state_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, bias, (0.0, 9.0))
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
