"""The CuPy backend on a GPU: equal to ``neurons.functional``, and at home in torch's machinery."""

import importlib.util
import itertools
import math
import random

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional as sj_functional

from neurons import SignedSpikeCount, SILIFNode, TILIFNode, compensation, functional, set_backend
from neurons.cupy.si_lif import kernel, ops
from tests.helpers.kernel_parity import (
    VARIANTS,
    Case,
    assert_bit_equal,
    assert_gradients_agree,
    check_compensated,
    check_count,
    check_multi_step,
)

DEVICE = "cuda"
OPERATORS = torch.ops.neurons
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy"),
]


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# ---- Equal to the oracle ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [math.inf, 3.0, 10.0])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3, 1.7])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_random_shapes(dtype: torch.dtype, tau: float, v_threshold: float, detach_reset: bool) -> None:
    rng = random.Random(f"{dtype}{tau}{v_threshold}{detach_reset}")
    shapes = [(rng.randint(1, 9), (rng.randint(1, 3000), rng.randint(1, 40))) for _ in range(3)]
    shapes += [(1, (rng.randint(1, 300_000),)), (rng.randint(2, 31), (8 * rng.randint(1, 9000),))]
    shapes += [(rng.randint(32, 150), (rng.randint(1, 5000),)), (rng.randint(2, 20), (rng.randint(1, 9),))]
    for seed, (T, shape) in enumerate(shapes):
        initial_v = bool(rng.randint(0, 1))
        case = Case(T, shape, dtype, None, tau, v_threshold, 4, 1.0, None, detach_reset, initial_v, seed=seed)
        check_multi_step(case, DEVICE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants(dtype: torch.dtype, variant: str) -> None:
    shapes = [(1, (4099,)), (6, (136, 512)), (5, (777,)), (0, (24,)), (8, (0,)), (1, (0, 3)), (67, (240,))]
    for T, shape in shapes:
        check_multi_step(Case(T, shape, dtype, **VARIANTS[variant]), DEVICE)


@pytest.mark.parametrize("T", [*range(10), 31, 32, 33, 63, 64, 65, 96, 97, 200])
def test_lengths(T: int) -> None:
    check_multi_step(Case(T, (1600,), torch.bfloat16, tau=3.0, initial_v=True), DEVICE)
    check_multi_step(Case(T, (1999,), torch.float32, tau=3.0, initial_v=True), DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_2048_steps(dtype: torch.dtype, v_threshold: float) -> None:
    check_multi_step(Case(2048, (1000,), dtype, tau=10.0, v_threshold=v_threshold, initial_v=True), DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3, 1.7])
@pytest.mark.parametrize(
    "surrogate", [SignedSpikeCount(1), SignedSpikeCount(4), SignedSpikeCount(8, 0.7, 2.5)]
)
def test_every_16_bit_value(dtype: torch.dtype, v_threshold: float, surrogate: SignedSpikeCount) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    check_count(values.to(DEVICE), v_threshold, surrogate)


@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_random_fp32_bit_patterns(v_threshold: float) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2**23 + 3, dtype=np.uint32)
    check_count(torch.from_numpy(bits.view(np.float32)).to(DEVICE), v_threshold, SignedSpikeCount(4))


@pytest.mark.parametrize(
    ("x_dtype", "spike_dtype"), [p for p in itertools.product(DTYPES, DTYPES[1:]) if p[0] != p[1]]
)
def test_autocast(x_dtype: torch.dtype, spike_dtype: torch.dtype) -> None:
    for T, shape in [(1, (20_051,)), (4, (6400,)), (40, (99,))]:
        check_multi_step(Case(T, shape, x_dtype, spike_dtype, tau=3.0, initial_v=True), DEVICE)
    with torch.autocast(DEVICE, spike_dtype):
        spike = ops.signed_spike_count(torch.randn(5, dtype=x_dtype, device=DEVICE), 1.0, SignedSpikeCount())
    assert spike.dtype == spike_dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", list(compensation.SMOOTH_FUNCTIONS))
@pytest.mark.parametrize("mode", compensation.MODES)
def test_compensated(mode: str, function: str, dtype: torch.dtype) -> None:
    for shape, wants_spike in [((3, 2053), True), ((300_000,), False), ((4, 1024, 256), True), ((0,), True)]:
        u = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(DEVICE, dtype)
        check_compensated(u, SignedSpikeCount(4, 0.7, 2.5), mode, function, 0.4, wants_spike)
    if dtype == torch.float32:
        with torch.autocast(DEVICE, torch.bfloat16):
            check_compensated(u, SignedSpikeCount(), mode, function, 0.4)


@pytest.mark.parametrize(("T", "N"), [(1, 2**31 + 2**20 + 3), (3, 2**30 + 8), (64, 2**25 + 1)])
def test_more_than_2_to_the_31_elements(T: int, N: int) -> None:
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free GPU memory")
    surrogate = SignedSpikeCount()
    x = torch.empty(T, N, dtype=torch.bfloat16, device=DEVICE).normal_().mul_(2).requires_grad_()
    grad = torch.empty(T, N, dtype=torch.bfloat16, device=DEVICE).normal_()
    spike, v, _ = ops.si_lif_multi_step(x, 0.0, 3.0, 1.0, surrogate)
    (grad_x,) = torch.autograd.grad(spike, x, grad)
    chunk = 2**27 // T
    for start in [0, N // 2 // 8 * 8, 2**31 // T - chunk // 2, N - chunk]:  # ends, middle, where 32 bits end
        part = slice(start, start + chunk)
        inputs = x.detach()[:, part].clone().requires_grad_()
        expected, expected_v, _ = functional.si_lif_multi_step(inputs, 0.0, 3.0, 1.0, surrogate)
        assert_bit_equal(spike.detach()[:, part], expected.detach())
        assert_bit_equal(v.detach()[part], expected_v.detach())
        (expected_grad,) = torch.autograd.grad(expected, inputs, grad[:, part])
        assert_gradients_agree(grad_x[:, part], expected_grad)
        del inputs, expected, expected_v, expected_grad


# ---- Nodes ----


def test_a_nodes_state_goes_on() -> None:
    x = torch.randn(6, 3, 500, device=DEVICE)
    nodes = [SILIFNode(tau=3.0, step_mode="m", store_v_seq=True) for _ in range(2)]
    set_backend(nodes[1], "cupy")
    expected, actual = (torch.cat([node(x[:2]), node(x[2:])]) for node in nodes)
    assert_bit_equal(actual, expected)
    assert_bit_equal(nodes[1].v, nodes[0].v)
    assert_bit_equal(nodes[1].v_seq, nodes[0].v_seq)
    sj_functional.reset_net(nodes[1])
    assert nodes[1].v == 0.0


def test_ternary_micro_steps_sum_to_the_count() -> None:
    node = TILIFNode(step_mode="m", backend="cupy")
    x = torch.cat([torch.randn(1, 5000, device=DEVICE) * 3, torch.zeros(3, 5000, device=DEVICE)])
    assert torch.equal(node(x).sum(0), SILIFNode(4)(x[0]))


def test_gradient_through_a_network() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 96), SILIFNode(tau=3.0, step_mode="m"), torch.nn.Linear(96, 8)
    )
    net = net.to(DEVICE)
    x = torch.randn(5, 32, 64, device=DEVICE)
    gradients = []
    for backend in ("torch", "cupy"):
        set_backend(net, backend)
        sj_functional.reset_net(net)
        net.zero_grad()
        net(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_errors() -> None:
    node = SILIFNode(step_mode="m", backend="cupy")
    with pytest.raises(RuntimeError, match="runs on CUDA tensors, got one on cpu"):
        node(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        node(torch.randn(2, 3, dtype=torch.float64, device=DEVICE))
    with pytest.raises(TypeError, match="spiking=False"):
        SILIFNode(4, surrogate_function=SignedSpikeCount(4, spiking=False), step_mode="m", backend="cupy")(
            torch.randn(2, 3, device=DEVICE)
        )
    with pytest.raises(ValueError, match="potential on cpu"):
        ops.si_lif_multi_step(torch.randn(2, 3, device=DEVICE), torch.zeros(3), 2.0, 1.0, SignedSpikeCount())


# ---- torch's machinery ----


def test_opcheck() -> None:
    for T, shape in [(5, (8,)), (1, (2, 3)), (40, (9,)), (0, (4,)), (3, (0,))]:
        x = torch.randn(T, *shape, device=DEVICE, requires_grad=True)
        v = torch.randn(shape, device=DEVICE, requires_grad=True)
        args = (x, v, 0.5, 0.7, 4, 1.0, 4.0, False, torch.float32, True, True)
        torch.library.opcheck(OPERATORS.si_lif_multi_step.default, args)
    x = torch.randn(3, 50, device=DEVICE, requires_grad=True)
    torch.library.opcheck(OPERATORS.signed_spike_count.default, (x, 0.7, 4, 1.0, 4.0, torch.float32, True))
    torch.library.opcheck(
        OPERATORS.compensated_spike_count.default, (x, 4, 1.0, 4.0, "blend", "clip", 0.5, torch.bfloat16)
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_breaks(compiler: str) -> None:
    surrogate = SignedSpikeCount()
    node = SILIFNode(tau=3.0, step_mode="m", backend="cupy")

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        node.reset()
        spike = node(x * 2.0)
        assert isinstance(node.v, torch.Tensor)
        return spike, node.v, ops.signed_spike_count(x, 1.0, surrogate) * 2.0

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    x = torch.randn(4, 240, device=DEVICE, requires_grad=True)
    expected, actual = function(x), compiled(x)
    for a, e in zip(actual, expected, strict=True):
        assert_bit_equal(a.detach(), e.detach())
    grads = [torch.randn_like(e) for e in expected]
    (expected_grad,) = torch.autograd.grad(expected, x, grads)
    (actual_grad,) = torch.autograd.grad(actual, x, grads)
    torch.testing.assert_close(
        actual_grad, expected_grad
    )  # the compiler may add the two paths in its own way


def test_cuda_graph() -> None:
    x = torch.randn(4, 8000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    surrogate = SignedSpikeCount()

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spike, v, _ = ops.si_lif_multi_step(x, 0.0, 3.0, 1.0, surrogate)
        (grad_x,) = torch.autograd.grad(spike, x, grad)
        return spike, v, grad_x

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * 2)
        graph.replay()
        torch.cuda.synchronize()
        for a, e in zip(captured, step(), strict=True):
            assert_bit_equal(a.detach(), e.detach())


def test_side_stream_beside_a_busy_default_stream() -> None:
    surrogate = SignedSpikeCount()
    source = torch.randn(4, 80_000, device=DEVICE) * 2
    grad = torch.randn_like(source)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spike, _, _ = ops.si_lif_multi_step(x, 0.0, 3.0, 1.0, surrogate)
        return spike.detach(), torch.autograd.grad(spike, x, grad)[0]

    expected = step(source.clone().requires_grad_())  # compiles, too
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # its memory and its kernels, whose loading may wait for the whole device
        step(source.clone().requires_grad_())
    for _ in range(3):
        x = torch.zeros_like(source).requires_grad_()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # about half a second of the default stream
        busy = torch.cuda.Event()
        busy.record()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # a kernel on a wrong stream would read the zeros
            with torch.no_grad():
                x.copy_(source)
            actual = step(x)
        side.synchronize()
        assert not busy.query(), "the side stream waited for the default stream"
        for a, e in zip(actual, expected, strict=True):
            assert_bit_equal(a, e)
        torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices() -> None:
    for device in ("cuda:1", "cuda:0", "cuda:1"):  # the current device stays 0
        check_multi_step(Case(5, (1000,), torch.bfloat16, tau=3.0, initial_v=True), device)
        check_multi_step(Case(40, (99,), torch.float32, tau=3.0, initial_v=True), device)


@pytest.mark.parametrize(("T", "N"), [(1, 2**24), (4, 2**22), (256, 24576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(dtype: torch.dtype, T: int, N: int) -> None:
    x = torch.randn(T, N, device=DEVICE).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    node = SILIFNode(step_mode="m", backend="cupy")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spike = node(x)
    (grad_x,) = torch.autograd.grad(spike, x, grad)
    peak = torch.cuda.max_memory_allocated() - before
    element = x.element_size()
    # The input and the gradient that comes in are there already; the spikes and one gradient are new.
    everything = 4 * element * T * N + T * N / 8 + 4 * N
    assert peak <= 2 * element * T * N + T * N / 8 + 4 * N + 0.05 * everything
    assert grad_x.shape == x.shape


def test_inference_keeps_no_mask() -> None:
    x = torch.randn(1, 2**24, device=DEVICE)
    with torch.no_grad():
        ops.signed_spike_count(x, 1.0, SignedSpikeCount())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spike = ops.signed_spike_count(x, 1.0, SignedSpikeCount())
        assert torch.cuda.max_memory_allocated() - before == spike.numel() * 4
    assert kernel.layout(1, 2**24).mask_bytes == 2**21


def test_stateless_node_equals_torch() -> None:
    x = torch.randn(3, 1001, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for backend in ("torch", "cupy"):
        node = SILIFNode(tau=3.0, step_mode="m", backend=backend)
        node.stateless = True
        spike = node(x)
        assert node.v == 0.0
        results.append((spike.detach(), torch.autograd.grad(spike, x, torch.ones_like(spike))[0]))
    for a, e in zip(*results, strict=True):
        assert_bit_equal(a, e)
