"""The kernels that mix SGC's smooth path into the spikes, without a GPU: compiled for one, run on the CPU."""

import itertools

import numpy as np
import pytest
import torch

from neurons import SignedSpikeCount, SILIFNode, compensation
from neurons.cupy.launcher import STORAGE
from neurons.cupy.si_lif import kernel, ops
from tests.helpers.kernel_parity import check_compensated

FUNCTIONS = tuple(compensation.SMOOTH_FUNCTIONS)
DTYPES = tuple(STORAGE)
VARIANTS = list(itertools.product(compensation.MODES, FUNCTIONS))
COUNT = SignedSpikeCount(4)


@pytest.mark.parametrize("name", ["forward_compensated", "backward_compensated"])
def test_compiles_to_ptx(nvrtc, name: str) -> None:
    pairs = [(x, s) for x in DTYPES for s in {x, torch.float16, torch.bfloat16}]
    instantiations = {
        kernel.module_options(name, kernel.Variant(x, s, True, False, False, grad_spike, mode, function))
        for (x, s), (mode, function), grad_spike in itertools.product(pairs, VARIANTS, (True, False))
    }
    options_of_each = sorted(instantiations)
    sources = nvrtc.ptx_of_each(kernel.SOURCE, options_of_each)
    for options, ptx in zip(options_of_each, sources, strict=True):
        assert f".entry {name}(" in ptx
        if ("-DX=F32" in options) == ("-DS=F32" in options):  # else 16 bytes in and 8 out
            assert "st.global.v4" in ptx
        if name.startswith("forward"):
            assert "sub.rn.f32" in ptx  # what decides about spikes is spelt in PTX here too


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(("mode", "function"), VARIANTS)
def test_equals_torch(mode: str, function: str, lam: float) -> None:
    u = torch.randn(3, 2053, generator=torch.Generator().manual_seed(0)) * 3
    u[0, :40] = torch.arange(-20, 20) / 2  # ties, integers, and the ends of the window and of the clip
    for surrogate in (COUNT, SignedSpikeCount(2, alpha=0.7, grad_window=1.25)):
        check_compensated(u, surrogate, mode, function, lam)
        check_compensated(u[:1], surrogate, mode, function, lam, wants_spike=False)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", compensation.MODES)
def test_every_16_bit_value(mode: str, function: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.from_numpy(np.arange(-(2**15), 2**15, dtype=np.int16)).view(dtype)
        check_compensated(values[values.isfinite()], COUNT, mode, function, 0.4)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("mode", compensation.MODES)
def test_nan_and_infinity(mode: str) -> None:
    u = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], requires_grad=True)
    for module in (compensation, ops):
        spike, mixed = module.compensated_spike_count(u, COUNT, mode, "scaled_tanh", 0.5)
        assert spike.isnan().tolist() == [True, False, False, False]
        assert mixed.isnan().tolist()[0]
        assert mixed[1:].tolist() == spike[1:].tolist()[:2] + [mixed[3].item()]
        assert spike[1:].tolist() == [4.0, -4.0, 1.0]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("spike_dtype", [torch.float16, torch.bfloat16])
def test_autocast(spike_dtype: torch.dtype) -> None:
    u = torch.randn(5, 100, requires_grad=True)
    with torch.autocast("cpu", spike_dtype):
        check_compensated(u, COUNT, "blend", "scaled_tanh", 0.5)
        spike, mixed = ops.compensated_spike_count(u, COUNT, "blend", "clip", 0.5)
    assert spike.dtype == mixed.dtype == spike_dtype


@pytest.mark.usefixtures("host")
def test_strides_offsets_and_nothing() -> None:
    wide = torch.randn(6, 64, 4)
    for u in (wide[..., ::2], wide.transpose(0, 1), wide.view(-1)[3:], wide[:0], torch.randn(())):
        check_compensated(u, COUNT, "blend", "tanh", 0.5)


@pytest.mark.usefixtures("host")
def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    saved: list[torch.Tensor] = []
    u = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.compensated_spike_count(u, COUNT, "blend", "tanh", 0.5)
    assert [t.data_ptr() for t in saved] == [u.data_ptr()]


@pytest.mark.usefixtures("host")
def test_opcheck() -> None:
    u = torch.randn(3, 50, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (u, 4, 1.0, 4.0, "blend", "scaled_tanh", 0.5, dtype)
        torch.library.opcheck(torch.ops.neurons.compensated_spike_count.default, arguments)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("backend", ["torch", "cupy"])
def test_a_node_gives_the_mixture_beside_its_spikes(backend: str) -> None:
    u = torch.randn(1, 3, 50)
    node = SILIFNode(4, step_mode="m", backend=backend)
    seen: list[torch.Tensor] = []
    node.register_forward_hook(lambda node, args, output: seen.append(output))
    spike, actual_mixed = node.compensated(u, "blend", "scaled_tanh", 0.5)
    expected, mixed = compensation.compensated_spike_count(u, COUNT, "blend", "scaled_tanh", 0.5)
    assert torch.equal(spike, expected)
    assert torch.equal(seen[0], expected)  # who counts spikes sees spikes
    torch.testing.assert_close(actual_mixed, mixed)
    assert torch.equal(node.stateless_step(u), expected)
    assert torch.equal(seen[1], expected)
    assert node.v == 0.0


@pytest.mark.usefixtures("host")
def test_no_kernel_for_another_surrogate() -> None:
    with pytest.raises(TypeError, match="SignedSpikeCount"):
        ops.compensated_spike_count(torch.randn(3), torch.nn.Identity(), "blend", "tanh", 0.5)
    with pytest.raises(TypeError, match="float64"):
        ops.compensated_spike_count(torch.randn(3).double(), COUNT, "blend", "tanh", 0.5)
