"""SILIFNode and TILIFNode as spikingjelly nodes: everything its users do with a node works on both."""

import copy
import inspect
import io
import math
import pickle

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import base, functional, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import neurons
from neurons import SignedSpikeCount, SILIFNode, TILIFNode, compensation
from neurons.functional import si_lif_multi_step

TOP = {SILIFNode: 3, TILIFNode: 1}


def make(cls, **kwargs):
    """A leaky node whose threshold is not 1."""
    count = {"max_spike_count": 3} if cls is SILIFNode else {}
    return cls(**{"tau": 2.0, "v_threshold": 0.5, **count, **kwargs})


def inputs(steps=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 4, 5, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[SILIFNode, TILIFNode])
def cls(request):
    return request.param


both_modes = pytest.mark.parametrize("mode", ["s", "m"])


def run(node, x_seq):
    """The whole sequence in either step mode, [T, N, *]."""
    return node(x_seq) if node.step_mode == "m" else torch.stack([node(x) for x in x_seq])


# --- the interface -----------------------------------------------------------------------------------------


def test_signatures():
    def signature(cls):
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]

    shared = [
        ("tau", math.inf), ("v_threshold", 1.0), ("surrogate_function", None), ("detach_reset", False),
        ("step_mode", "s"), ("backend", "torch"), ("store_v_seq", False),
    ]  # fmt: skip
    assert signature(TILIFNode) == shared
    assert signature(SILIFNode) == [("max_spike_count", 4), *shared]


def test_class_hierarchy_and_defaults(cls):
    node = cls()
    assert isinstance(node, neuron.BaseNode)
    assert isinstance(node, base.MemoryModule)
    top = 4 if cls is SILIFNode else 1
    assert node.max_spike_count == node.surrogate_function.max_spike_count == top
    assert isinstance(node.surrogate_function, SignedSpikeCount)
    assert (node.v, node.v_reset, node.v_seq) == (0.0, None, None)
    assert (node.tau, node.v_threshold, node.detach_reset, node.step_mode) == (math.inf, 1.0, False, "s")
    assert cls().surrogate_function is not node.surrogate_function  # no shared default


def test_repr(cls):
    first = f"{cls.__name__}(\n  max_spike_count={TOP[cls]}, tau=2.0, v_threshold=0.5, detach_reset=True, "
    assert repr(make(cls, detach_reset=True, step_mode="m")).startswith(
        first + "step_mode=m, backend=torch\n  (surrogate_function): SignedSpikeCount(max_spike_count="
    )


@both_modes
def test_state_dict_is_empty(cls, mode):
    node = make(cls, step_mode=mode, store_v_seq=True)
    run(node, inputs())
    assert node.state_dict() == {}
    assert list(node.parameters()) == []
    assert list(node.buffers()) == []
    node.load_state_dict({})


@both_modes
@pytest.mark.parametrize("detach_reset", [False, True])
def test_node_computes_the_equations(cls, mode, detach_reset):
    x = inputs().requires_grad_()
    node = make(cls, step_mode=mode, detach_reset=detach_reset)
    spike = run(node, x)
    expected, v, _ = si_lif_multi_step(x, 0.0, 2.0, 0.5, SignedSpikeCount(TOP[cls]), detach_reset)
    assert torch.equal(spike, expected)
    assert torch.equal(node.v, v)
    weight = inputs(seed=1)
    (grad,) = torch.autograd.grad((weight * spike).sum() + node.v.sum(), x)
    (expected_grad,) = torch.autograd.grad((weight * expected).sum() + v.sum(), x)
    assert torch.equal(grad, expected_grad)
    assert grad.any()


def test_ternary_node_is_the_integer_node_with_one_level():
    spike = make(TILIFNode, step_mode="m")(4 * inputs())
    assert torch.equal(spike, make(SILIFNode, max_spike_count=1, step_mode="m")(4 * inputs()))
    assert spike.unique().tolist() == [-1, 0, 1]


def test_ternary_micro_steps_sum_to_the_count():
    x = 3 * inputs(1)[0]
    micro = torch.zeros(5, *x.shape)
    micro[0] = x
    ternary, integer = TILIFNode(step_mode="m"), SILIFNode(5)
    assert torch.equal(ternary(micro).sum(0), integer(x))
    assert torch.equal(ternary.v, integer.v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tau", [math.inf, 3.0])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_step_by_step_equals_multi_step(cls, dtype, tau, detach_reset):
    results = []
    for mode in "sm":
        x = inputs(7, dtype=dtype).requires_grad_()
        node = make(cls, tau=tau, step_mode=mode, detach_reset=detach_reset, store_v_seq=True)
        spike = run(node, x)
        (spike.float() * inputs(7, 1)).sum().backward()
        results.append((spike, node.v, node.v_seq, x.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# --- state -------------------------------------------------------------------------------------------------


@both_modes
def test_state_goes_on_between_calls(cls, mode):
    x = inputs(7)
    whole, parts = make(cls, step_mode=mode), make(cls, step_mode=mode)
    expected = run(whole, x)
    got = torch.cat([run(parts, x[:3]), run(parts, x[3:4]), run(parts, x[4:])])
    assert torch.equal(got, expected)
    assert torch.equal(parts.v, whole.v)
    assert not torch.equal(run(make(cls, step_mode=mode), x[3:]), expected[3:])  # the state matters


@both_modes
@pytest.mark.parametrize("store_v_seq", [False, True])
def test_reset_net_makes_the_node_as_new(cls, mode, store_v_seq):
    net = nn.Sequential(nn.Identity(), make(cls, step_mode=mode, store_v_seq=store_v_seq))
    run(net[1], inputs(seed=1))
    for _ in range(2):  # reset_net caches what it found on the first call
        functional.reset_net(net)
        assert net[1].v == 0.0
        assert isinstance(net[1].v, float)
        assert net[1].v_seq is None
        fresh = make(cls, step_mode=mode, store_v_seq=store_v_seq)
        assert torch.equal(run(net[1], inputs()), run(fresh, inputs()))
        assert torch.equal(net[1].v, fresh.v)


@both_modes
def test_potential_set_by_hand(cls, mode):
    as_number, as_tensor = make(cls, step_mode=mode), make(cls, step_mode=mode)
    as_number.v, as_tensor.v = 0.4, torch.full((4, 5), 0.4)
    assert torch.equal(run(as_number, inputs()), run(as_tensor, inputs()))
    assert torch.equal(as_number.v, as_tensor.v)


@both_modes
def test_another_shape_starts_afresh_as_in_spikingjelly(cls, mode):
    node = make(cls, step_mode=mode)
    run(node, inputs())
    x = inputs()[:, :2]
    assert torch.equal(run(node, x), run(make(cls, step_mode=mode), x))
    assert node.v.shape == (2, 5)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_potential_stays_float32(cls, mode, dtype):
    node = make(cls, step_mode=mode, store_v_seq=True)
    assert run(node, inputs(dtype=dtype)).dtype == dtype
    assert node.v.dtype == node.v_seq.dtype == torch.float32
    assert not torch.equal(node.v, node.v.to(dtype).float())  # it uses its precision
    run(node, inputs())  # another input dtype: the same potential goes on
    both = make(cls, step_mode=mode)
    run(both, torch.cat([inputs(dtype=dtype).float(), inputs()]))
    assert torch.equal(node.v, both.v)


@both_modes
def test_float64_is_computed_in_float64(cls, mode):
    node = make(cls, step_mode=mode, store_v_seq=True)
    assert run(node, inputs(dtype=torch.float64)).dtype == torch.float64
    assert node.v.dtype == node.v_seq.dtype == torch.float64
    assert not torch.equal(node.v, node.v.float().double())


@both_modes
def test_store_v_seq(cls, mode):
    node = make(cls, step_mode=mode)
    run(node, inputs())
    assert node.v_seq is None
    node = make(cls, step_mode=mode, store_v_seq=True)
    run(node, inputs())
    _, _, expected = si_lif_multi_step(inputs(), 0.0, 2.0, 0.5, SignedSpikeCount(TOP[cls]), store_v_seq=True)
    assert torch.equal(node.v_seq, expected)
    assert torch.equal(node.v_seq[-1], node.v)
    node.store_v_seq = False
    run(node, inputs())
    assert node.v_seq is None


@both_modes
def test_detach_net_cuts_the_graph(cls, mode):
    first, second = inputs(3), inputs(3, 1)
    for cut in (False, True):
        node = make(cls, step_mode=mode, store_v_seq=True)
        x = first.clone().requires_grad_()
        run(node, x)
        v = node.v.detach().clone()
        if cut:
            functional.detach_net(nn.Sequential(node))
            assert not node.v.requires_grad
            assert not node.v_seq.requires_grad
            assert torch.equal(node.v, v)
        y = second.clone().requires_grad_()
        (run(node, y) * second).sum().backward()
        assert y.grad.any()
        assert (x.grad is None) == cut


def test_set_step_mode(cls):
    net = nn.Sequential(make(cls), nn.ModuleDict({"inner": make(cls)}))
    functional.set_step_mode(net, "m")
    assert [m.step_mode for m in net.modules() if isinstance(m, cls)] == ["m", "m"]
    node, x = net[0], inputs()
    first = node(x[:3])
    functional.set_step_mode(net, "s")  # in the middle of a sequence
    rest = run(node, x[3:])
    assert torch.equal(torch.cat([first, rest]), run(make(cls), x))
    with pytest.raises(ValueError, match="step_mode"):
        node.step_mode = "x"


@both_modes
def test_to_functional_forward_of_a_node(cls, mode):
    x = inputs() if mode == "m" else inputs()[0]
    node = make(cls, step_mode=mode)
    forward = base.to_functional_forward(node)
    start = inputs(seed=2)[0]
    before = start.clone()
    (spike,), (v,) = forward((x,), (start,))
    assert node.v == 0.0  # its own state is left alone
    assert torch.equal(start, before)
    node.v = start
    assert torch.equal(node(x), spike)
    assert torch.equal(node.v, v)
    (spike,), (v,) = forward((x,), (0.0,))  # the state of a fresh node
    functional.reset_net(node)
    assert torch.equal(node(x), spike)
    assert torch.equal(node.v, v)


@both_modes
def test_to_functional_forward_of_a_net(cls, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), make(cls), nn.Linear(5, 3), make(cls), nn.Linear(3, 2))
    functional.set_step_mode(net, mode)
    x = inputs() if mode == "m" else inputs()[0]
    forward = base.to_functional_forward(net)
    states = tuple(base.extract_memories(net))
    assert states == (0.0, 0.0)
    for _ in range(3):
        (out,), states = forward((x,), states)
    assert (net[1].v, net[3].v) == (0.0, 0.0)
    for _ in range(3):
        expected = net(x)
    assert torch.equal(out, expected)
    assert torch.equal(states[0], net[1].v)
    assert torch.equal(states[1], net[3].v)


def test_functional_forward_passes_the_gradient_to_the_initial_potential(cls):
    node = make(cls, step_mode="m")
    x, start = inputs().requires_grad_(), inputs(seed=2)[0].requires_grad_()
    (spike,), (v,) = base.to_functional_forward(node)((x,), (start,))
    expected, expected_v, _ = si_lif_multi_step(x, start, 2.0, 0.5, SignedSpikeCount(TOP[cls]))
    grads = torch.autograd.grad((spike * inputs(seed=3)).sum() + v.sum(), [x, start])
    expected_grads = torch.autograd.grad((expected * inputs(seed=3)).sum() + expected_v.sum(), [x, start])
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.equal(a, b)
        assert a.any()


# --- what spikingjelly and torch do to modules -------------------------------------------------------------


@both_modes
def test_monitors(cls, mode):
    from spikingjelly.activation_based import monitor  # needs tensorboard

    net = nn.Sequential(nn.Identity(), make(cls, step_mode=mode, store_v_seq=True))
    with (
        monitor.OutputMonitor(net, instance=cls) as outputs,
        monitor.InputMonitor(net, instance=cls) as seen,
        monitor.AttributeMonitor("v", False, net, instance=cls) as after,
        monitor.AttributeMonitor("v", True, net, instance=cls) as before,
        monitor.AttributeMonitor("v_seq", False, net, instance=cls) as sequences,
    ):
        x = inputs() if mode == "m" else inputs()[0]
        spikes = [net(x), net(x)]
    assert outputs.monitored_layers == ["1"]
    assert len(outputs.records) == len(seen.records) == len(after.records) == 2
    for i in range(2):
        assert torch.equal(outputs["1"][i], spikes[i])
        assert torch.equal(seen["1"][i], x)
    assert before["1"][0] == 0.0
    assert torch.equal(before["1"][1], after["1"][0])
    assert torch.equal(after["1"][1], net[1].v)
    assert torch.equal(sequences["1"][1], net[1].v_seq)
    net(x)
    assert len(outputs.records) == 2  # closed


def clone_by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_modes
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), clone_by_torch])
def test_copies_in_the_middle_of_a_sequence(cls, mode, clone):
    node = make(cls, step_mode=mode, detach_reset=True, store_v_seq=True)
    run(node, inputs())
    twin = clone(node)
    assert repr(twin) == repr(node)
    assert twin.store_v_seq is True
    assert torch.equal(run(twin, inputs(seed=1)), run(copy.deepcopy(node), inputs(seed=1)))
    v = node.v.clone()
    functional.reset_net(twin)
    run(twin, inputs(seed=2))
    assert torch.equal(node.v, v)  # each has a state of its own


def test_fresh_node_survives_pickling(cls):
    node = pickle.loads(pickle.dumps(make(cls)))
    assert torch.equal(run(node, inputs()), run(make(cls), inputs()))


def check_compiled(cls, mode, backend):
    torch._dynamo.reset()
    x = inputs(3).requires_grad_()
    node = make(cls, step_mode=mode)
    compiled = torch.compile(node, fullgraph=True, backend=backend)
    chunks = [x[:2], x[2:]] if mode == "m" else list(x)  # from the fresh state, then from a tensor
    spikes = [compiled(chunk) for chunk in chunks]
    spike = torch.cat([s if mode == "m" else s.unsqueeze(0) for s in spikes])
    (grad,) = torch.autograd.grad((spike * inputs(3, 1)).sum(), x)
    eager = make(cls, step_mode=mode)
    expected = run(eager, x)
    assert torch.equal(spike, expected)
    assert torch.equal(node.v, eager.v)
    (expected_grad,) = torch.autograd.grad((expected * inputs(3, 1)).sum(), x)
    assert torch.equal(grad, expected_grad)
    assert grad.any()


@both_modes
def test_compiles_to_one_graph(cls, mode):
    check_compiled(cls, mode, "aot_eager")


def test_compiled_code_computes_the_same():
    check_compiled(SILIFNode, "m", "inductor")


@both_modes
def test_autocast(cls, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), make(cls, step_mode=mode, store_v_seq=True), nn.Linear(5, 2))
    x = inputs() if mode == "m" else inputs()[0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = net[0](x)
        spike = net[1](hidden)
        out = net[2](spike)
        direct = make(cls, step_mode=mode)(x)
    assert hidden.dtype == spike.dtype == out.dtype == direct.dtype == torch.bfloat16
    assert net[1].v.dtype == net[1].v_seq.dtype == torch.float32
    assert torch.equal(direct, make(cls, step_mode=mode)(x).bfloat16())
    out.float().square().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.any()


@both_modes
def test_the_input_is_never_modified(cls, mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = inputs(dtype=dtype)
        before = x.clone()
        spike = run(make(cls, v_threshold=1.0, tau=math.inf, step_mode=mode), x)
        spike.zero_()
        assert torch.equal(x, before)
        assert x._version == 0


def test_no_steps_and_no_neurons(cls):
    node = make(cls, step_mode="m", store_v_seq=True)
    assert node(inputs(0)).shape == (0, 4, 5)
    assert torch.equal(node.v, torch.zeros(4, 5))
    assert node.v_seq.shape == (0, 4, 5)
    run(node, inputs())
    v = node.v.clone()
    assert node(inputs(0)).shape == (0, 4, 5)
    assert torch.equal(node.v, v)
    for mode, x in (("m", torch.zeros(3, 0, 2)), ("s", torch.zeros(0, 2))):
        node = make(cls, step_mode=mode)
        assert node(x).shape == x.shape
        assert node.v.shape == (0, 2)


@both_modes
def test_non_finite_inputs(cls, mode):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    spike = run(make(cls, step_mode=mode), x)[0]
    assert spike[0].isnan()
    assert spike[1:].tolist() == [TOP[cls], -TOP[cls], min(TOP[cls], 2)]  # u = 2


@both_modes
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integer_inputs_are_type_errors(cls, mode, dtype):
    node = make(cls, step_mode=mode)
    with pytest.raises(TypeError, match="floating-point"):
        node(torch.ones(2, 3, dtype=dtype))
    assert node.v == 0.0
    node(torch.ones(2, 3))
    with pytest.raises(TypeError, match="floating-point"):  # also with a potential
        node(torch.ones(2, 3, dtype=dtype))


@both_modes
def test_count_too_large_for_the_dtype(mode):
    node = SILIFNode(257, step_mode=mode)
    x = torch.full((2, 3), 300.0)
    with pytest.raises(ValueError, match=r"max_spike_count=257 is not exact in torch\.bfloat16"):
        node(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="not exact"):
        node(x)
    functional.reset_net(node)
    assert run(node, x)[0].tolist() == [257] * 3


# --- surrogates --------------------------------------------------------------------------------------------


class Soft(surrogate.SurrogateFunctionBase):
    """A user's own surrogate: signed spikes, the slope of tanh."""

    def __init__(self, alpha=1.0, spiking=True):
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def primitive_function(x, alpha):
        return torch.tanh(alpha * x)

    @staticmethod
    def spiking_function(x, alpha):
        smooth = torch.tanh(alpha * x)
        return x.detach().sign() * (x.detach().abs() > 0.5) + (smooth - smooth.detach())


@both_modes
def test_ones_own_surrogate(cls, mode):
    x = inputs(1).requires_grad_()
    node = make(cls, surrogate_function=Soft(0.5), step_mode=mode)
    spike = run(node, x)
    assert torch.equal(spike, x.sign() * (x.abs() > 0.25))  # V_th = 0.5
    spike.sum().backward()
    # d tanh(a x / V_th) / dx = a / V_th (1 - tanh^2) with a / V_th = 1
    torch.testing.assert_close(x.grad, 1 - torch.tanh(x.detach()) ** 2)


def test_surrogates_of_spikingjelly_plug_in(cls):
    node = make(cls, surrogate_function=surrogate.ATan())
    x = inputs()[0].requires_grad_()
    spike = node(x)
    assert torch.equal(spike, (x >= 0).float())
    spike.sum().backward()
    assert x.grad.all()


def test_surrogate_of_another_count_is_refused():
    with pytest.raises(ValueError, match="max_spike_count=8 is not the node's 4"):
        SILIFNode(4, surrogate_function=SignedSpikeCount(8))
    with pytest.raises(ValueError, match="max_spike_count=4 is not the node's 1"):
        TILIFNode(surrogate_function=SignedSpikeCount(4))
    assert SILIFNode(8, surrogate_function=SignedSpikeCount(8, alpha=0.5)).surrogate_function.alpha == 0.5
    assert TILIFNode(surrogate_function=SignedSpikeCount(1, grad_window=2.0)).max_spike_count == 1


# --- constructor errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [True, 4.0, "4", None])
def test_max_spike_count_is_an_integer(count):
    with pytest.raises(TypeError, match="max_spike_count must be an integer"):
        SILIFNode(count)


@pytest.mark.parametrize("count", [0, -3])
@pytest.mark.parametrize("custom", [None, Soft()])
def test_max_spike_count_is_positive(count, custom):
    with pytest.raises(ValueError, match="max_spike_count must be at least 1"):
        SILIFNode(count, surrogate_function=custom)


def test_max_spike_count_may_be_numpys():
    assert type(SILIFNode(np.int32(2)).max_spike_count) is int


@pytest.mark.parametrize("threshold", [1, True, "1.0", None])
def test_threshold_is_a_float(cls, threshold):
    with pytest.raises(TypeError, match="v_threshold must be a float"):
        cls(v_threshold=threshold)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_threshold_is_positive_and_finite(cls, threshold):
    with pytest.raises(ValueError, match="v_threshold must be finite and positive"):
        cls(v_threshold=threshold)


@pytest.mark.parametrize("tau", [1.0, 0.5, 1, 0.0, -2.0, math.nan, -math.inf])
def test_tau_is_greater_than_one(cls, tau):
    with pytest.raises(ValueError, match="tau must be greater than 1"):
        cls(tau=tau)


@pytest.mark.parametrize("tau", [True, "2", None, 2j])
def test_tau_is_a_number(cls, tau):
    with pytest.raises(TypeError, match="tau must be a float"):
        cls(tau=tau)


def test_tau_may_be_an_integer_or_infinite(cls):
    assert cls(tau=2).tau == 2.0
    assert isinstance(cls(tau=2).tau, float)
    assert cls(tau=math.inf).tau == math.inf


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("surrogate_function", "atan", TypeError),
        ("detach_reset", 1, TypeError),
        ("step_mode", "x", ValueError),
        ("backend", "triton", ValueError),
        ("backend", None, ValueError),
    ],
)
def test_other_arguments(cls, argument, value, error):
    with pytest.raises(error, match=argument):
        cls(**{argument: value})


def test_exports():
    assert set(neurons.__all__) <= set(dir(neurons))


@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_stateless_steps_are_windows_of_their_own(v_threshold):
    node = SILIFNode(3, tau=2.0, v_threshold=v_threshold, step_mode="m")
    x = torch.randn(5, 4, 6, requires_grad=True)
    expected = []
    for step in x:  # a fresh neuron for every step
        expected.append(node(step.unsqueeze(0))[0])
        node.reset()
    node.stateless = True
    actual = node(x)
    assert node.v == 0.0
    assert torch.equal(actual, torch.stack(expected))
    grad = torch.randn_like(actual)
    (expected_grad,) = torch.autograd.grad(torch.stack(expected), x, grad)
    (actual_grad,) = torch.autograd.grad(actual, x, grad)
    assert torch.equal(actual_grad, expected_grad)


# --- gradient checkpointing ---


def _gradient(node, x, function):
    x = x.clone().requires_grad_()
    functional.reset_net(node)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (function(x) * weights).sum().backward()
    return x.grad


@both_modes
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_checkpointed_begins_with_a_reset(cls, mode, reentrant):
    node, x = make(cls, step_mode=mode), inputs()

    def run(x_seq):
        functional.reset_net(node)
        return node(x_seq) if mode == "m" else torch.stack([node(x) for x in x_seq])

    def again(x_seq):
        return checkpoint(run, x_seq, use_reentrant=reentrant)

    torch.testing.assert_close(_gradient(node, x, again), _gradient(node, x, run))
    node(x if mode == "m" else x[0])  # afterwards it goes on as ever


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_checkpointed_may_set_the_potential(cls, reentrant):
    node, x, start = make(cls, step_mode="m"), inputs(), torch.full((4, 5), 0.2)

    def run(x_seq):
        node.v = start
        return node(x_seq)

    def again(x_seq):
        return checkpoint(run, x_seq, use_reentrant=reentrant)

    torch.testing.assert_close(_gradient(node, x, again), _gradient(node, x, run))


@both_modes
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_potential_that_would_move_on_twice_is_refused(cls, mode, reentrant):
    """Its gradients would be wrong by as much as they are large."""
    node, x = make(cls, step_mode=mode), inputs() if mode == "m" else inputs()[0]
    with pytest.raises(RuntimeError, match=rf"{cls.__name__} runs again.*functional\.reset_net"):
        _gradient(node, x, lambda x: checkpoint(node, x, use_reentrant=reentrant))
    functional.reset_net(node)
    node(x)  # nothing is left of it


def test_a_nodes_largest_count_is_its_surrogates():
    node = SILIFNode(4)
    with pytest.raises(ValueError, match="max_spike_count=4 is not the node's 8"):
        node.max_spike_count = 8
    assert node.max_spike_count == 4
    node.surrogate_function = SignedSpikeCount(8)
    assert node.max_spike_count == 8
    assert node(torch.tensor([7.0])) == 7
    assert "max_spike_count=8" in repr(node)
    node.max_spike_count = 8
    node.surrogate_function = surrogate.ATan()  # which says nothing of it
    assert node.max_spike_count == 8
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert other.max_spike_count == 8


@pytest.mark.parametrize(
    ("mode", "function", "lam", "said"),
    [
        ("blnd", "clip", 0.5, "mode must be one of"),
        ("blend", "clp", 0.5, "function must be one of"),
        ("blend", "clip", 2.0, r"lam must lie in \[0, 1\]"),
        ("replace", "tanh", -0.1, r"lam must lie in \[0, 1\]"),
        ("gradient", "tanh", float("nan"), r"lam must lie in \[0, 1\]"),
    ],
)
def test_compensation_that_is_none(mode, function, lam, said):
    u = torch.randn(3)
    for call in (
        lambda: compensation.compensate(u, u.round(), mode, function, lam, 4),
        lambda: SILIFNode(4).compensated(u, mode, function, lam),
    ):
        with pytest.raises(ValueError, match=said):
            call()
