"""Choosing a backend: never half-way, never silently something else."""

import sys

import pytest
import torch
from spikingjelly.activation_based import base, functional, neuron
from torch import nn

from neurons import SignedCountToTernary, SILIFNode, TILIFNode, set_backend

NODES = pytest.mark.parametrize("cls", [SILIFNode, TILIFNode])


def a_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 3),
        SILIFNode(step_mode="m"),
        nn.Sequential(neuron.LIFNode(step_mode="m"), TILIFNode(step_mode="s")),
        SignedCountToTernary(2),
    )


class Careless(nn.Module):
    """A user's own module, whose backend takes any value."""

    supported_backends = ("torch",)
    backend = "torch"


def backends(net: nn.Module) -> list[str]:
    return [m.backend for m in net.modules() if isinstance(m, SILIFNode)]


@pytest.fixture
def no_cupy(monkeypatch):
    """CuPy is not installed, whether it is or not."""
    monkeypatch.setitem(sys.modules, "cupy", None)


@NODES
def test_supported_backends_by_step_mode(cls):
    node = cls()
    assert tuple(node.supported_backends) == ("torch",)
    node.step_mode = "m"
    assert tuple(node.supported_backends) == ("torch", "cupy")


def test_set_backend_reaches_every_node_in_either_step_mode():
    net = a_net()
    assert backends(net) == ["torch", "torch"]
    set_backend(net, "cupy")
    assert backends(net) == ["cupy", "cupy"]
    functional.set_step_mode(net[2], "m")  # nor does another step mode raise, in either order
    functional.set_step_mode(net[2], "s")
    set_backend(net, "torch")
    assert backends(net) == ["torch", "torch"]


def test_set_backend_leaves_other_modules_alone():
    net = a_net()
    before = [dict(vars(m)) for m in (net[0], net[2][0], net[3])]
    set_backend(net, "cupy")
    assert [dict(vars(m)) for m in (net[0], net[2][0], net[3])] == before


def test_set_backend_sets_the_module_itself():
    node = SILIFNode()
    assert set_backend(node, "cupy") is None
    assert node.backend == "cupy"


def test_set_backend_for_some_classes_only():
    net = a_net()
    set_backend(net, "cupy", instance=TILIFNode)
    assert backends(net) == ["torch", "cupy"]
    set_backend(net, "torch")
    set_backend(net, "cupy", instance=(TILIFNode, nn.Linear))
    assert backends(net) == ["torch", "cupy"]
    set_backend(net, "torch", instance=nn.Linear)
    assert backends(net) == ["torch", "cupy"]
    set_backend(net, "torch", SILIFNode)  # a TILIFNode is a SILIFNode
    assert backends(net) == ["torch", "torch"]


@pytest.mark.parametrize("backend", ["triton", "CUPY", "", None, 1])
def test_unknown_backend_changes_nothing(backend):
    net = nn.Sequential(Careless(), *a_net())
    set_backend(net, "cupy", instance=TILIFNode)
    with pytest.raises(ValueError, match="backend must be one of") as error:
        set_backend(net, backend)
    assert repr(backend) in str(error.value)
    assert net[0].backend == "torch"  # the net is never left half-way
    assert backends(net) == ["torch", "cupy"]
    node = SILIFNode()
    with pytest.raises(ValueError, match="backend must be one of"):
        node.backend = backend
    assert node.backend == "torch"


def test_unknown_backend_is_an_error_without_nodes_too():
    with pytest.raises(ValueError, match="backend must be one of"):
        set_backend(nn.Linear(2, 2), "triton")


@NODES
@pytest.mark.usefixtures("no_cupy")
def test_without_cupy_the_call_says_what_to_install(cls):
    node = cls(step_mode="m", backend="cupy")
    for call in (
        lambda: node(torch.ones(2, 3)),
        lambda: base.to_functional_forward(node)((torch.ones(2, 3),), (0.0,)),
    ):
        with pytest.raises(RuntimeError, match=r"CuPy.*pip install cupy-cuda"):
            call()
    assert node.v == 0.0  # no step was made
    node.backend = "torch"
    assert node(torch.ones(2, 3)).shape == (2, 3)


@NODES
def test_cupy_in_single_step_mode_is_an_error_at_the_call(cls):
    node = cls(step_mode="s", backend="cupy")
    with pytest.raises(RuntimeError, match=r"backend='cupy'.*step mode 'm'"):
        node(torch.ones(3))
    assert node.v == 0.0


@NODES
def test_cupy_never_falls_back_on_the_cpu(cls):
    # Whatever is installed here, CPU tensors cannot go through CuPy.
    node = cls(step_mode="m", backend="cupy")
    with pytest.raises(RuntimeError, match="cupy"):
        node(torch.ones(2, 3))
    assert node.v == 0.0
