"""Neurons in configurations: what a spec can build, and what it cannot reach."""

import importlib
import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import base, neuron, surrogate
from torch import nn

import neurons
from neurons import SignedSpikeCount, SILIFNode, TILIFNode, build, register, registry, spec_of


@pytest.fixture(autouse=True)
def _registered_by_nobody(monkeypatch):
    """Registrations are the process's: let none leak from one test to another."""
    monkeypatch.setattr(registry, "_registered", {})


class Own(base.MemoryModule):
    """A user's own node."""

    def __init__(self, gain: float = 2.0, name: str = "own") -> None:
        super().__init__()
        self.gain, self.name = gain, name

    def single_step_forward(self, x):
        return self.gain * x


class OwnSurrogate(SignedSpikeCount):
    """A user's own surrogate, in the same module."""


class Forgetful(base.MemoryModule):
    """Does not keep its argument."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()


class Holder(base.MemoryModule):
    def __init__(self, value=None) -> None:
        super().__init__()
        self.value = value


OWN = f"{__name__}.Own"


# --- round trips -------------------------------------------------------------------------------------------

INSTANCES = [
    lambda: SILIFNode(),
    lambda: SILIFNode(8, 2.5, 0.5, SignedSpikeCount(8, alpha=0.5, grad_window=3.0), True, "m", "cupy", True),
    lambda: SILIFNode(2, surrogate_function=surrogate.ATan(alpha=3.0), step_mode="m"),
    lambda: TILIFNode(),
    lambda: TILIFNode(tau=3, surrogate_function=SignedSpikeCount(1, grad_window=math.inf), step_mode="m"),
    lambda: neuron.LIFNode(tau=3.0, v_reset=None, surrogate_function=surrogate.Sigmoid(2.0), step_mode="m"),
    lambda: neuron.ILIFNode(step_mode="m"),
    lambda: neuron.ILIFNode(
        tau=4.0, surrogate_function=surrogate.MultiLevelSpikeCount(6, grad_window=(-1.0, 5.0)), step_mode="m"
    ),
    lambda: neuron.TernaryLIFNode(tau=2.5, step_mode="m"),
    lambda: SignedSpikeCount(3, alpha=0.5),
    lambda: surrogate.ATan(alpha=5.0, spiking=False),
]


@pytest.mark.parametrize("instance", INSTANCES)
def test_round_trip_through_json(instance):
    module = instance()
    spec = spec_of(module)
    assert set(spec) == {"class", "args"}
    twin = build(json.loads(json.dumps(spec)))
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert json.loads(json.dumps(spec_of(twin))) == json.loads(json.dumps(spec))
    if getattr(module, "backend", "torch") != "torch":
        return  # cannot run here
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    grads = []
    for m in (module, twin):
        y = x.clone().requires_grad_()
        out = m(y)
        (out * torch.arange(20.0)).sum().backward()
        grads += [out, y.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])
    assert grads[1].any()


def test_spec_by_hand():
    assert spec_of(SILIFNode(8, tau=2.0, surrogate_function=SignedSpikeCount(8, alpha=0.5))) == {
        "class": "neurons.SILIFNode",
        "args": {
            "max_spike_count": 8,
            "tau": 2.0,
            "surrogate_function": {
                "class": "neurons.SignedSpikeCount",
                "args": {"max_spike_count": 8, "alpha": 0.5},
            },
        },
    }


def test_build_by_hand():
    spec = {
        "class": "neurons.SILIFNode",
        "args": {
            "max_spike_count": 8,
            "surrogate_function": {
                "class": "neurons.surrogate.SignedSpikeCount",
                "args": {"max_spike_count": 8},
            },
        },
    }
    before = json.dumps(spec)
    node = build(spec)
    assert type(node) is SILIFNode
    assert type(node.surrogate_function) is SignedSpikeCount
    assert node.max_spike_count == node.surrogate_function.max_spike_count == 8
    assert json.dumps(spec) == before
    for spec in ({"class": "neurons.TILIFNode"}, {"class": "neurons.TILIFNode", "args": None}):
        assert type(build(spec)) is TILIFNode


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("neurons.SILIFNode", SILIFNode),
        ("neurons.TILIFNode", TILIFNode),
        ("neurons.SignedSpikeCount", SignedSpikeCount),
        ("neurons.surrogate.SignedSpikeCount", SignedSpikeCount),
        ("spikingjelly.activation_based.neuron.LIFNode", neuron.LIFNode),
        ("spikingjelly.activation_based.neuron.ILIFNode", neuron.ILIFNode),
        ("spikingjelly.activation_based.surrogate.Sigmoid", surrogate.Sigmoid),
    ],
)
def test_exported_names(name, cls):
    assert type(build({"class": name})) is cls


# --- one's own classes -------------------------------------------------------------------------------------


def test_own_class_needs_to_be_registered():
    spec = {"class": OWN, "args": {"gain": 3.0}}
    with pytest.raises(ValueError, match=r"neurons\.register\(\)"):
        build(spec)
    assert register(Own) is Own  # so it is a decorator
    module = build(spec)
    assert type(module) is Own
    assert module.gain == 3.0
    assert spec_of(module) == spec
    with pytest.raises(ValueError, match="Unknown"):  # that opens nothing else of its module
        build({"class": f"{__name__}.OwnSurrogate"})
    with pytest.raises(ValueError, match=f"Unknown .* did you mean '{OWN}'"):
        build({"class": "Own"})
    with pytest.raises(ValueError, match=r"did you mean 'spikingjelly\.activation_based\.neuron\.LIFNode'"):
        build({"class": "LIFNode"})
    with pytest.raises(TypeError, match=r"the class and not a node: SILIFNode\(\)\?"):
        build(SILIFNode)


def test_own_surrogate_inside_a_node():
    register(OwnSurrogate)
    spec = {
        "class": "neurons.SILIFNode",
        "args": {"surrogate_function": {"class": f"{__name__}.OwnSurrogate"}},
    }
    node = build(spec)
    assert type(node.surrogate_function) is OwnSurrogate
    assert type(build(spec_of(node)).surrogate_function) is OwnSurrogate


def test_own_surrogate_inside_a_node_needs_to_be_registered_too():
    spec = {
        "class": "neurons.SILIFNode",
        "args": {"surrogate_function": {"class": f"{__name__}.OwnSurrogate"}},
    }
    with pytest.raises(ValueError, match="OwnSurrogate"):
        build(spec)


def test_the_class_of_an_instance_is_trusted():
    spec = spec_of(Own(name="mine"))
    assert spec == {"class": OWN, "args": {"name": "mine"}}
    assert type(build(spec)) is Own


def test_a_subclass_is_not_its_parent():
    class Sub(SILIFNode):
        pass

    spec = spec_of(Sub())
    assert spec["class"].endswith("<locals>.Sub")
    assert type(build(spec)) is Sub


def test_registering_cannot_replace_an_exported_name():
    fake = type("SILIFNode", (Own,), {"__module__": "neurons"})
    register(fake)
    assert type(build({"class": "neurons.SILIFNode"})) is SILIFNode


@pytest.mark.parametrize("thing", [nn.Linear, Own(), "neurons.SILIFNode", print, None, dict])
def test_register_takes_nodes_and_surrogates(thing):
    with pytest.raises(TypeError, match="register takes"):
        register(thing)
    assert registry._registered == {}


def test_spec_of_other_modules_is_an_error():
    with pytest.raises(TypeError, match="A Linear is no neuron"):
        spec_of(nn.Linear(2, 2))


def test_spec_of_a_class_that_forgets_an_argument():
    with pytest.raises(TypeError, match="does not keep its argument 'gain'"):
        spec_of(Forgetful())


@pytest.mark.parametrize("value", [torch.ones(2), {1, 2}, print])
def test_spec_holds_plain_data_only(value):
    with pytest.raises(TypeError, match="no plain data"):
        spec_of(Holder(value))


# --- what a spec must not reach ----------------------------------------------------------------------------

REFUSED = [
    # further than one name
    "neurons.functional.torch.nn.Linear",
    "neurons.os.system",
    "neurons.si_lif.SILIFNode",
    "neurons.si_lif.math.inf",
    "neurons.registry.importlib.import_module",
    "neurons.surrogate.SignedSpikeCount.forward",
    "neurons.SILIFNode.__init__",
    "neurons.surrogate.torch.load",
    "spikingjelly.activation_based.neuron.base_node.BaseNode",
    "spikingjelly.activation_based.neuron.lif.LIFNode",
    "spikingjelly.activation_based.base.MemoryModule",
    "torch.nn.Linear",
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    # exported, but no neuron and no surrogate
    "neurons.functional",
    "neurons.surrogate",
    "neurons.build",
    "neurons.set_backend",
    "neurons.MicroStepSum",
    "neurons.surrogate.torch",
    "spikingjelly.activation_based.surrogate.heaviside",
    "spikingjelly.activation_based.surrogate.sigmoid",
    "spikingjelly.activation_based.surrogate.nn",
    "spikingjelly.activation_based.neuron.torch",
    "spikingjelly.activation_based.neuron.lif",
    # no name at all
    "SILIFNode", "neurons", "neurons.", ".SILIFNode", "neurons..SILIFNode", " neurons.SILIFNode", "",
    "neurons.silifnode", "neurons:SILIFNode", "neurons/SILIFNode", "__main__.SILIFNode",
    "neurons.__dict__", "neurons.__builtins__", "neurons.surrogate._SignedSpikeCount",
]  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, None, 3, b"neurons.SILIFNode", ["neurons.SILIFNode"], SILIFNode])
def test_refused_names(name):
    with pytest.raises(ValueError, match="Unknown neuron or surrogate class"):
        build({"class": name})
    with pytest.raises(ValueError, match="Unknown neuron or surrogate class"):  # inside another spec too
        build({"class": "neurons.SILIFNode", "args": {"surrogate_function": {"class": name}}})


@pytest.mark.parametrize("module", [neurons, neurons.surrogate, neuron, surrogate])
def test_private_classes_are_refused(monkeypatch, module):
    monkeypatch.setattr(module, "_Hidden", Own, raising=False)
    monkeypatch.setattr(module, "Shown", Own, raising=False)
    assert type(build({"class": f"{module.__name__}.Shown"})) is Own
    with pytest.raises(ValueError, match="Unknown"):
        build({"class": f"{module.__name__}._Hidden"})


@settings(deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.from_regex(r"(neurons|spikingjelly|torch|os)(\.[A-Za-z_]{1,12}){1,4}")))
def test_only_the_known_names_are_found(name):
    if name not in registry._exported():
        with pytest.raises(ValueError, match="Unknown"):
            build({"class": name})


def test_every_name_that_a_spec_can_reach_is_a_neuron_or_a_surrogate():
    names = registry._exported()
    assert len(names) > 40
    for name, cls in names.items():
        assert issubclass(cls, base.MemoryModule | surrogate.SurrogateFunctionBase)
        assert name.rpartition(".")[0] in (
            "neurons",
            "neurons.surrogate",
            "spikingjelly.activation_based.neuron",
            "spikingjelly.activation_based.surrogate",
        )


def test_nothing_is_imported_by_a_spec(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text(
        "from neurons import SILIFNode\nclass Node(SILIFNode): pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = set(sys.modules)
    for name in ("trap_module.Node", "neurons.trap_module.Node", "trap_module", "antigravity.x", "this.s"):
        with pytest.raises(ValueError, match="Unknown"):
            build({"class": name})
    assert set(sys.modules) == loaded
    node = importlib.import_module("trap_module").Node  # the trap works, ...
    with pytest.raises(ValueError, match="Unknown"):  # ... and having been imported is not enough
        build({"class": "trap_module.Node"})
    register(node)
    assert type(build({"class": "trap_module.Node"})) is node
    del sys.modules["trap_module"]


# --- errors that help --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("neurons.SILIFNod", "neurons.SILIFNode"),
        ("neurons.TILIF", "neurons.TILIFNode"),
        ("spikingjelly.activation_based.neuron.LIFnode", "spikingjelly.activation_based.neuron.LIFNode"),
        ("spikingjelly.activation_based.surrogate.Atan", "spikingjelly.activation_based.surrogate.ATan"),
        (OWN + "s", OWN),
    ],
)
def test_the_nearest_name_is_in_the_message(name, nearest):
    register(Own)
    with pytest.raises(ValueError, match="did you mean") as error:
        build({"class": name})
    assert f"did you mean {nearest!r}?" in str(error.value)
    assert repr(name) in str(error.value)


def test_an_argument_that_does_not_exist():
    with pytest.raises(TypeError, match="no argument 'max_spike_cont'; did you mean 'max_spike_count'"):
        build({"class": "neurons.SILIFNode", "args": {"max_spike_cont": 3}})
    with pytest.raises(TypeError, match="no argument 'zzz'; it takes tau, v_threshold"):
        build({"class": "neurons.TILIFNode", "args": {"zzz": 3}})
    with pytest.raises(TypeError, match="no argument 4"):
        build({"class": "neurons.SILIFNode", "args": {4: 3}})


def test_a_refused_value_is_the_constructors_error():
    with pytest.raises(ValueError, match="tau must be greater than 1"):
        build({"class": "neurons.SILIFNode", "args": {"tau": 0.5}})


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "neurons.SILIFNode",
        3,
        [],
        {},
        {"args": {}},
        {"class": "neurons.SILIFNode", "kwargs": {}},
        SILIFNode,
    ],
)
def test_not_a_spec(spec):
    with pytest.raises(TypeError, match="A neuron is described as"):
        build(spec)


@pytest.mark.parametrize("args", [[4], "tau", 4, True, [], "", 0, False])
def test_args_are_a_mapping(args):
    with pytest.raises(TypeError, match="must be a mapping"):
        build({"class": "neurons.SILIFNode", "args": args})
