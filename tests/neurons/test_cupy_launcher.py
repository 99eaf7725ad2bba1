"""What every CuPy kernel shares: sources with their includes, one launch, operators stated once."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from neurons.cupy import launcher
from neurons.cupy.operators import operator
from neurons.cupy.si_lif import kernel

# ---- Sources ----


def test_a_source_holds_what_it_includes(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    (tmp_path / "shared.cuh").write_text("shared\n")
    (folder / "part.cuh").write_text('#include "../shared.cuh"\npart\n')
    (folder / "kernel.cu").write_text('first\n#include "part.cuh"\n#include <system>\nlast\n')
    assert launcher.Source(folder / "kernel.cu").text.split("\n") == [
        '#line 1 "kernel.cu"',
        "first",
        '#line 1 "part.cuh"',
        '#line 1 "shared.cuh"',
        "shared",
        '#line 2 "part.cuh"',
        "part",
        '#line 3 "kernel.cu"',
        "#include <system>",
        "last",
    ]


def test_the_compiler_names_the_included_file(nvrtc, tmp_path: Path) -> None:
    (tmp_path / "part.cuh").write_text("int fine;\nint wrong\n")
    (tmp_path / "kernel.cu").write_text('\n#include "part.cuh"\nextern "C" __global__ void run() {}\n')
    with pytest.raises(AssertionError, match=r"part\.cuh\(2\)|kernel\.cu\(3\)"):
        nvrtc.ptx(launcher.Source(tmp_path / "kernel.cu"), ("-arch=compute_90",))


def test_the_package_ships_every_file_of_a_source() -> None:
    configuration = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    package = kernel.SOURCE.path.parents[2]
    for path in (*package.rglob("*.cu"), *package.rglob("*.cuh")):
        parts = path.relative_to(package).parts
        assert f'"{"/".join([parts[0], *["*"] * (len(parts) - 2), f"*{path.suffix}"])}"' in configuration


# ---- The launch ----


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CuPy and CUDA as far as a launch looks at them; device 0 is the current one."""
    seen = SimpleNamespace(compiled=[], launches=[], devices=[], streams={})

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...], backend: str) -> None:
            seen.compiled.append((code, options, backend))

        def get_function(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(kernel=lambda *args, **kwargs: seen.launches.append((name, args, kwargs)))

    @contextlib.contextmanager
    def device(device: torch.device):
        seen.devices.append(device.index)
        yield

    def stream(device: torch.device) -> SimpleNamespace:
        return seen.streams.setdefault(device.index, SimpleStream(device.index))

    cuda = SimpleNamespace(Stream=object, ExternalStream=lambda pointer, device: (pointer, device))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=cuda))
    monkeypatch.setattr(launcher, "check_cupy", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return seen


class SimpleStream:
    def __init__(self, device_index: int) -> None:
        self.device_index, self.cuda_stream = device_index, 1000 + device_index


def test_compiles_once_a_device_and_launches_on_its_stream(fake: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text("text")
    source, options = launcher.Source(tmp_path / "kernel.cu"), launcher.defines({"VEC": 4})
    args = (np.uint64(8), np.int64(2**40))
    for index in (0, 1, 0, 1):
        launcher.launch(source, "run", torch.device("cuda", index), options, (3, 2), (64,), args)
    assert fake.compiled == [(source.text, ("--fmad=false", "-DVEC=4"), "nvrtc")] * 2
    assert fake.devices == [1, 1]  # the current one is left alone
    assert fake.launches == [
        ("run", ((3, 2), (64,), args), {"stream": (1000 + index, index)}) for index in (0, 1, 0, 1)
    ]
    launcher.launch(source, "run", torch.device("cuda", 0), launcher.defines({"VEC": 8}), (1,), (64,), args)
    launcher.launch(source, "other", torch.device("cuda", 0), options, (1,), (64,), args)
    assert len(fake.compiled) == 4


def test_vector_width_follows_the_widest_dtype() -> None:
    widths = [
        launcher.vector_width(*dtypes)
        for dtypes in [
            (torch.int8,),
            (torch.bfloat16,),
            (torch.float16, torch.float32),
            (torch.int8, torch.int32),
        ]
    ]
    assert widths == [16, 8, 4, 4]


def test_checks_name_what_a_kernel_takes() -> None:
    with pytest.raises(TypeError, match=r"takes int8, got torch\.float32"):
        launcher.check_input(torch.zeros(2), (torch.int8,))
    with pytest.raises(RuntimeError, match="got one on meta"):
        launcher.check_input(torch.zeros(2, device="meta"))


# ---- Operators ----


class _Scale(NamedTuple):
    factor: float
    times: int
    shape: list[int]
    dtype: torch.dtype
    negate: bool
    name: str


def _empty(x: Tensor, y: Tensor | None, call: _Scale) -> tuple[Tensor, Tensor]:
    return x.new_empty(call.shape, dtype=call.dtype), x.new_empty(x.shape)


@operator("test_scale", _empty)
def _scale(x: Tensor, y: Tensor | None, call: _Scale) -> tuple[Tensor, Tensor]:
    """What is documented here."""
    scaled = x * (call.factor * call.times * (-1 if call.negate else 1))
    return x.new_zeros(call.shape, dtype=call.dtype), scaled if y is None else scaled + y


def _scale_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor | None, _Scale], output: tuple[Tensor, Tensor]
) -> None:
    _, y, ctx.call = inputs
    ctx.has_y = y is not None


def _scale_backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    sign = -1 if ctx.call.negate else 1
    return grad * (ctx.call.factor * ctx.call.times * sign), grad if ctx.has_y else None


_scale.differentiable(_scale_setup, _scale_backward)


@operator("test_double", lambda x: torch.empty_like(x))
def _double(x: Tensor) -> Tensor:
    return x * 2


def test_an_operator_states_its_parameters_once() -> None:
    assert str(torch.ops.neurons.test_scale.default._schema) == (
        "neurons::test_scale(Tensor x, Tensor? y, float factor, int times, SymInt[] shape, ScalarType dtype, "
        "bool negate, str name) -> (Tensor, Tensor)"
    )
    assert str(torch.ops.neurons.test_double.default._schema) == "neurons::test_double(Tensor x) -> Tensor"
    assert _scale.__doc__ == "What is documented here."


def test_an_operator_is_called_as_its_function_is() -> None:
    x, y = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    call = _Scale(0.5, 3, [2, 2], torch.bfloat16, True, "any")

    def both(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return *_scale(x, y, call), _double(x.detach())

    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        zeros, scaled, doubled = function(x, y)
        assert (zeros.dtype, zeros.shape) == (torch.bfloat16, (2, 2))
        assert torch.equal(scaled, -1.5 * x + y)
        assert torch.equal(doubled, 2 * x)
    grads = torch.autograd.grad(_scale(x, y, call)[1].sum(), (x, y))
    assert [g.tolist() for g in grads] == [[-1.5] * 5, [1.0] * 5]
    assert torch.autograd.grad(_scale(x, None, call)[1].sum(), x)[0].tolist() == [-1.5] * 5
    for optional in (y, None):
        torch.library.opcheck(torch.ops.neurons.test_scale.default, (x, optional, *call))
    torch.library.opcheck(torch.ops.neurons.test_double.default, (x.detach(),))
