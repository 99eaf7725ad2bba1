"""The CuPy backend without a GPU: its source compiles for GPUs, and run on the CPU it equals the oracle."""

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional as sj_functional
from torch.utils._python_dispatch import TorchDispatchMode

from neurons import SignedSpikeCount, SILIFNode, TILIFNode
from neurons.cupy.launcher import STORAGE
from neurons.cupy.si_lif import kernel, ops
from tests.helpers.kernel_parity import VARIANTS, Case, check_count, check_multi_step

OPERATORS = torch.ops.neurons
KERNELS = [f"{d}_{f}" for d in ("forward", "backward") for f in ("single", "wide", "tall")]
# Input and spikes: equal, or the spikes in one of autocast's two dtypes.
PAIRS = [(x, s) for x, s in itertools.product(STORAGE, repeat=2) if s in (x, torch.float16, torch.bfloat16)]


# ---- NVRTC ----


def _instantiations(name: str) -> list[tuple[str, ...]]:
    """Every instantiation of kernel ``name`` that the operators can ask for, at the default tuning."""
    forward, single = name.startswith("forward"), name.endswith("single")
    return sorted(
        {
            kernel.module_options(name, kernel.Variant(x, s, unit, stateful, v_seq, grad_spike))
            for (x, s), unit, stateful, v_seq, grad_spike in itertools.product(
                PAIRS,
                (True, False),
                (False, True) if single else (True,),
                (False, True),
                (True,) if forward else (True, False),
            )
            if stateful or (grad_spike and not v_seq)
        }
    )


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_to_ptx(nvrtc, name: str) -> None:
    # CuPy appends -ftz=true to whatever it is given; the arithmetic must not listen to it.
    instantiations = [(*options, "-ftz=true") for options in _instantiations(name)]
    sources = nvrtc.ptx_of_each(kernel.SOURCE, instantiations)
    for options, ptx in zip(instantiations, sources, strict=True):
        assert f".entry {name}(" in ptx
        instructions = [
            line.split()[0] for line in ptx.splitlines() if line.startswith("\t") and line.split()
        ]
        assert not [i for i in instructions if i.startswith("fma")]
        arithmetic = {
            i for i in instructions if i.split(".")[0] in ("add", "sub", "mul", "div") and "f32" in i
        }
        assert arithmetic
        assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
        assert ("div.rn.f32" in arithmetic) == ("-DUNIT_THRESHOLD=0" in options)


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("name", [k for k in KERNELS if not k.endswith("tall")])
def test_accesses_16_bytes(nvrtc, name: str, dtype: torch.dtype) -> None:
    options = kernel.module_options(name, kernel.Variant(dtype, dtype, True, False))
    ptx = nvrtc.ptx(kernel.SOURCE, (*options, "-arch=compute_90"))
    assert "ld.global.nc.v4" in ptx or "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


# ---- The source on the CPU ----


def _every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3, 1.7])
@pytest.mark.parametrize(
    "surrogate", [SignedSpikeCount(1), SignedSpikeCount(4), SignedSpikeCount(8, 0.7, 2.5)]
)
def test_every_16_bit_value(dtype: torch.dtype, v_threshold: float, surrogate: SignedSpikeCount) -> None:
    check_count(_every_value(dtype), v_threshold, surrogate)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_random_fp32_bit_patterns(v_threshold: float) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_003, dtype=np.uint32)
    check_count(torch.from_numpy(bits.view(np.float32)), v_threshold, SignedSpikeCount(4))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("tau", [math.inf, 3.0, 10.0])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3, 1.7])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_sequences(dtype: torch.dtype, tau: float, v_threshold: float, detach_reset: bool) -> None:
    # One block and a ragged second one; rows that cannot be vectors; the kernels for long sequences.
    for T, shape in [(1, (2053,)), (5, (257, 8)), (4, (3, 33)), (70, (40,)), (33, (3,))]:
        for initial_v in (False, True):
            case = Case(T, shape, dtype, None, tau, v_threshold, 4, 1.0, None, detach_reset, initial_v)
            check_multi_step(case, "cpu")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_variants(dtype: torch.dtype, variant: str) -> None:
    for T, shape in [
        (1, (2051,)),
        (6, (136, 16)),
        (5, (77,)),
        (0, (24,)),
        (8, (0,)),
        (1, (0, 3)),
        (67, (24,)),
    ]:
        check_multi_step(Case(T, shape, dtype, **VARIANTS[variant]), "cpu")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("T", [2, 4, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 200])
def test_lengths(T: int) -> None:
    check_multi_step(Case(T, (16,), torch.bfloat16, tau=3.0, initial_v=True), "cpu")
    check_multi_step(Case(T, (19,), torch.float32, tau=3.0, initial_v=True), "cpu")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("x_dtype", "spike_dtype"), [p for p in PAIRS if p[0] != p[1]])
def test_autocast(x_dtype: torch.dtype, spike_dtype: torch.dtype) -> None:
    for T, shape in [(1, (2051,)), (4, (64,)), (40, (9,))]:
        check_multi_step(Case(T, shape, x_dtype, spike_dtype, tau=3.0, initial_v=True), "cpu")
    with torch.autocast("cpu", spike_dtype):
        spike = ops.signed_spike_count(torch.randn(5, dtype=x_dtype), 1.0, SignedSpikeCount())
    assert spike.dtype == spike_dtype


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    "knobs",
    [
        {"wide_ring": 1},
        {"wide_ring": 3, "block": 32},
        {"tall_ring": 8, "tall_block": 32},
        {"vec_state": 8},
        {"vec_stateless": 4},
    ],
    ids=str,
)
def test_tuning_changes_no_result(monkeypatch: pytest.MonkeyPatch, knobs: dict[str, int]) -> None:
    monkeypatch.setattr(kernel, "TUNING", dataclasses.replace(kernel.TUNING, **knobs))
    for T, shape in [(1, (2051,)), (7, (264,)), (41, (19,))]:
        check_multi_step(Case(T, shape, torch.bfloat16, tau=3.0, initial_v=True, specials=True), "cpu")
    check_count(torch.randn(3001, dtype=torch.bfloat16), 1.0, SignedSpikeCount())


@pytest.mark.usefixtures("host")
def test_a_nodes_state_goes_on() -> None:
    x = torch.randn(6, 3, 5)
    nodes = [SILIFNode(tau=3.0, step_mode="m", store_v_seq=True, backend=b) for b in ("torch", "cupy")]
    expected, actual = (torch.cat([node(x[:2]), node(x[2:])]) for node in nodes)
    assert torch.equal(actual, expected)
    assert torch.equal(nodes[1].v, nodes[0].v)
    assert torch.equal(nodes[1].v_seq, nodes[0].v_seq)
    sj_functional.reset_net(nodes[1])
    assert nodes[1].v == 0.0


@pytest.mark.usefixtures("host")
def test_ternary_node() -> None:
    node = TILIFNode(step_mode="m", backend="cupy")
    x = torch.cat([torch.randn(1, 50) * 3, torch.zeros(3, 50)])
    assert torch.equal(node(x).sum(0), SILIFNode(4)(x[0]))


# ---- The operators ----


def _multi_step_arguments(device: str, x_dtype=torch.float32, T=5, shape=(8,), grad=True):
    x = torch.randn(T, *shape, device=device).to(x_dtype).requires_grad_(grad)
    v = torch.randn(shape, device=device).requires_grad_(grad)
    return (x, v, 0.5, 0.7, 4, 1.0, 4.0, False, x_dtype, True, True)


@pytest.mark.usefixtures("host")
def test_opcheck() -> None:
    for T, shape in [(5, (8,)), (1, (2, 3)), (40, (9,)), (0, (4,)), (3, (0,))]:
        torch.library.opcheck(
            OPERATORS.si_lif_multi_step.default, _multi_step_arguments("cpu", T=T, shape=shape)
        )
    x = torch.randn(3, 50, requires_grad=True)
    torch.library.opcheck(OPERATORS.signed_spike_count.default, (x, 0.7, 4, 1.0, 4.0, torch.float32, True))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_graph_breaks(dynamic: bool) -> None:
    surrogate, node = SignedSpikeCount(), SILIFNode(tau=3.0, step_mode="m", backend="cupy")

    def function(x: torch.Tensor) -> torch.Tensor:
        node.reset()
        return node(x).sum() + node.v.sum() + ops.signed_spike_count(x, 1.0, surrogate).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (4, 6):
        x = torch.randn(T, 24, requires_grad=True)
        (expected,) = torch.autograd.grad(function(x), x)
        (actual,) = torch.autograd.grad(compiled(x), x)
        assert torch.equal(actual, expected)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **kwargs or {})


@pytest.mark.usefixtures("host")
def test_whoever_watches_operators_sees_ours() -> None:
    """Called plainly, the kernels skip the operators; the results are the same."""
    x, v = torch.randn(3, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    surrogate, results = SignedSpikeCount(), []
    for mode in (contextlib.nullcontext(), _Log()):
        with mode:
            spike, last, _ = ops.si_lif_multi_step(x, v, 3.0, 0.7, surrogate)
            count = ops.signed_spike_count(x, 0.7, surrogate)
            _, mixed = ops.compensated_spike_count(x, surrogate, "blend", "tanh", 0.5)
            loss = (spike * 2).sum() + (last * 3).sum() + (count * 5).sum() + mixed.sum()
            results.append((spike, last, count, mixed, *torch.autograd.grad(loss, (x, v))))
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)
    operators = ("si_lif_multi_step", "signed_spike_count", "compensated_spike_count")
    assert {f"neurons::{o}{end}" for o in operators for end in ("", "_backward")} <= set(mode.names)


@pytest.mark.usefixtures("host")
def test_the_mask_is_kept_only_for_a_backward_pass() -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.si_lif_multi_step(x, 0.0, math.inf, 1.0, SignedSpikeCount())
        assert not saved
        ops.si_lif_multi_step(x.requires_grad_(), 0.0, math.inf, 1.0, SignedSpikeCount())
    assert [t.dtype for t in saved] == [torch.uint8]
    with torch.no_grad():
        *_, mask, _ = OPERATORS.si_lif_multi_step(*_multi_step_arguments("cpu")[:-2], False, False)
    assert mask.numel() == 0
    spike, *_ = OPERATORS.si_lif_multi_step(*_multi_step_arguments("cpu")[:-2], False, False)
    with pytest.raises(RuntimeError, match="store_mask=False"):
        spike.sum().backward()


@pytest.mark.parametrize(
    ("T", "N"), [(1, 2**26), (4, 2**24), (2048, 24576), (64, 2**21), (16, 4096), (5, 10_001)]
)
def test_the_mask_is_one_bit_an_element(T: int, N: int) -> None:
    io_bytes = 4 * 2 * T * N + 4 * N  # bf16 input, output and their gradients, the potential
    assert kernel.layout(T, N).mask_bytes <= T * N / 8 + 0.05 * io_bytes


def test_layouts() -> None:
    assert [kernel.layout(T, N).family for T, N in [(1, 10**6 + 1), (4, 2**24), (2048, 24576), (4, 9)]] == [
        "single", "wide", "tall", "tall",
    ]  # fmt: skip
    plan = kernel.layout(1, 2**31 + 5)
    assert plan.grid * plan.block * 8 >= 2**31 + 5


def test_argument_packing() -> None:
    x = torch.zeros(3, 16)
    args = kernel.pack((x, None), 3, 16, (0.5, 1.0, 1e300), (True,))
    assert [a.dtype.name for a in args] == [
        "uint64", "uint64", "int32", "int64", "float32", "float32", "float32", "int32", "int32",
    ]  # fmt: skip
    assert args[0] == x.data_ptr()
    assert args[1] == 0
    assert (args[2], args[3]) == (3, 16)
    assert np.isinf(args[6])
    assert args[-1] == 1
    aligned = [
        kernel.pack((t,), T, N, ())[-1]
        for t, T, N in [(x.view(-1)[1:], 1, 47), (x, 3, 15), (x, 1, 47), (x.view(-1)[4:], 1, 44)]
    ]
    assert aligned == [0, 0, 1, 1]


def test_options_follow_the_call() -> None:
    options = kernel.module_options("forward_wide", kernel.Variant(torch.float32, torch.bfloat16, True, True))
    assert {
        "-DONLY_forward_wide=1",
        "-DX=F32",
        "-DS=BF16",
        "-DUNIT_THRESHOLD=1",
        "-DVEC=4",
        "--fmad=false",
    } <= set(options)
    assert "-DUNIT_THRESHOLD=0" in kernel.module_options(
        "backward_tall", kernel.Variant(torch.float16, torch.float16, False, True)
    )
