"""What the CuPy backend cannot run raises an error that says why."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from neurons import SignedSpikeCount, SILIFNode, TILIFNode, backend, set_backend, si_lif
from neurons.cupy.si_lif import ops


def _call(node: SILIFNode, x: torch.Tensor) -> torch.Tensor:
    return node(x)


@pytest.fixture
def fresh_check():
    backend.check_cupy.cache_clear()
    yield
    backend.check_cupy.cache_clear()


@pytest.mark.usefixtures("fresh_check")
def test_cupy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(RuntimeError, match="not installed: pip install cupy"):
        _call(SILIFNode(step_mode="m", backend="cupy"), torch.randn(2, 3))


@pytest.mark.usefixtures("fresh_check")
def test_cupy_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"installed but does not import: libcudart\.so\.13"):
        _call(SILIFNode(step_mode="m", backend="cupy"), torch.randn(2, 3))


@pytest.fixture
def cupy_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(si_lif, "check_cupy", lambda: None)


class _Subclass(SignedSpikeCount):
    """Changes nothing, so the kernel serves it."""


class _Other(SignedSpikeCount):
    @staticmethod
    def spiking_function(x, max_spike_count, alpha, grad_window):
        return x.round()


@pytest.mark.usefixtures("cupy_there")
@pytest.mark.parametrize(
    ("surrogate", "name"),
    [
        (_Other(4), "_Other"),
        (SignedSpikeCount(4, spiking=False), "spiking=False"),
        (torch.nn.Identity(), "Identity"),
    ],
)
def test_surrogate_without_a_kernel(surrogate, name: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)no.*{name}|SignedSpikeCount.*{name}"):
        _call(SILIFNode(4, surrogate_function=surrogate, step_mode="m", backend="cupy"), torch.randn(2, 3))


@pytest.mark.usefixtures("host")
def test_a_subclass_that_overrides_nothing_has_a_kernel() -> None:
    x = torch.randn(2, 3)
    node = SILIFNode(4, surrogate_function=_Subclass(4), step_mode="m", backend="cupy")
    assert torch.equal(node(x), SILIFNode(4, step_mode="m")(x))


@pytest.mark.usefixtures("cupy_there")
def test_input_errors() -> None:
    node = SILIFNode(step_mode="m", backend="cupy")
    with pytest.raises(RuntimeError, match="runs on CUDA tensors, got one on cpu"):
        node(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        node(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        node(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="step mode 'm' only"):
        SILIFNode(step_mode="s", backend="cupy")(torch.randn(3))


@pytest.mark.usefixtures("host")
def test_state_errors() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="potential on meta"):
        ops.si_lif_multi_step(x, torch.zeros(3, device="meta"), math.inf, 1.0, SignedSpikeCount())
    with pytest.raises(RuntimeError):
        ops.si_lif_multi_step(x, torch.zeros(4), math.inf, 1.0, SignedSpikeCount())
    with pytest.raises(ValueError, match="not exact"):
        ops.si_lif_multi_step(x.bfloat16(), 0.0, math.inf, 1.0, SignedSpikeCount(300))


@pytest.mark.usefixtures("cupy_there")
def test_set_backend_never_raises_half_way() -> None:
    net = torch.nn.Sequential(SILIFNode(step_mode="s"), TILIFNode(step_mode="m"))
    set_backend(net, "cupy")
    assert [m.backend for m in net] == ["cupy", "cupy"]
