"""The configuration, and every kind of neuron that it can name: train, save, load."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from spikingjelly.activation_based import neuron as jelly
from spikingjelly.activation_based import surrogate
from transformers import AutoConfig, AutoModelForCausalLM

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from tests.helpers.tiny import INTEGER, tiny_config, tiny_model, tokens

JELLY = "spikingjelly.activation_based."
ATAN = {"class": JELLY + "surrogate.ATan", "args": {"alpha": 3.0}}


@neurons.register
class StepWithSlope(surrogate.SurrogateFunctionBase):
    """A surrogate of a user's own: Heaviside forward, a constant slope backward."""

    class _Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.slope = slope
            return (x >= 0).to(x)

        @staticmethod
        def backward(ctx, grad):
            return ctx.slope * grad, None

    def __init__(self, slope: float = 0.5, spiking: bool = True) -> None:
        super().__init__(spiking=spiking, slope=slope)

    @staticmethod
    def spiking_function(x, slope):
        return StepWithSlope._Step.apply(x, slope)

    @staticmethod
    def primitive_function(x, slope):
        return slope * x


@neurons.register
class EagerNode(jelly.LIFNode):
    """A node of a user's own."""

    def __init__(self, eagerness: float = 0.2, surrogate_function=None, step_mode: str = "s") -> None:
        surrogate_function = StepWithSlope() if surrogate_function is None else surrogate_function
        super().__init__(
            v_threshold=1.0 - eagerness, surrogate_function=surrogate_function, step_mode=step_mode
        )
        self.eagerness = eagerness


OWN = f"{EagerNode.__module__}.EagerNode"
OWN_SLOPE = f"{StepWithSlope.__module__}.StepWithSlope"
NEURONS = {
    "SILIFNode": {"class": "neurons.SILIFNode", "args": {"max_spike_count": 2, "tau": 3.0}},
    "own surrogate window": {
        "class": "neurons.SILIFNode",
        "args": {"surrogate_function": {"class": "neurons.SignedSpikeCount", "args": {"grad_window": 2.5}}},
    },
    "TILIFNode": {"class": "neurons.TILIFNode"},
    "LIFNode": {"class": JELLY + "neuron.LIFNode", "args": {"surrogate_function": ATAN, "v_threshold": 0.3}},
    "ILIFNode": {
        "class": JELLY + "neuron.ILIFNode",
        "args": {
            "surrogate_function": {
                "class": JELLY + "surrogate.MultiLevelSpikeCount",
                "args": {"max_spike_count": 3},
            }
        },
    },
    "TernaryLIFNode": {
        "class": JELLY + "neuron.TernaryLIFNode",
        "args": {"surrogate_function": ATAN, "v_threshold": 0.3, "v_reset": None},
    },
    "ParametricLIFNode": {"class": JELLY + "neuron.ParametricLIFNode", "args": {"v_threshold": 0.3}},
    "own node": {"class": OWN, "args": {"eagerness": 0.7}},
    "own node and surrogate": {
        "class": OWN,
        "args": {"surrogate_function": {"class": OWN_SLOPE, "args": {"slope": 0.25}}},
    },
}


def train_save_load(model, folder):
    """One AdamW step; what was saved gives the same logits."""
    ids = tokens(2, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model.train()(ids, labels=ids).loss
    assert loss.isfinite()
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is SpikingMambaForCausalLM
    assert loaded.config.neuron == model.config.neuron
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    return loaded


@pytest.mark.parametrize("membrane", ["token", "sequence"])
@pytest.mark.parametrize("name", NEURONS)
def test_neuron_by_config(name, membrane, tmp_path):
    dense = tiny_model()
    model = SpikingMambaForCausalLM.from_dense(dense, neuron=NEURONS[name], membrane=membrane, threshold=0.5)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(tokens(1, 5)).logits, dense(tokens(1, 5)).logits)
    loaded = train_save_load(model, tmp_path / "model")
    assert loaded.config.membrane == membrane
    with torch.no_grad():
        at_once = loaded(tokens(2, 8)).logits
        cache, pieces = None, []
        for piece in tokens(2, 8).split(1, dim=1):
            output = loaded(piece, cache=cache, use_cache=True)
            cache = output.cache
            pieces.append(output.logits)
    assert torch.allclose(torch.cat(pieces, 1), at_once, atol=1e-4)


@pytest.mark.parametrize("membrane", ["token", "sequence"])
@pytest.mark.parametrize(
    "node",
    [
        neurons.SILIFNode(2, tau=3.0),
        neurons.TILIFNode(detach_reset=True),
        jelly.LIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan(alpha=3.0)),
        jelly.ILIFNode(surrogate_function=surrogate.MultiLevelSpikeCount(3)),
        jelly.TernaryLIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan()),
        EagerNode(0.7, StepWithSlope(0.25)),
    ],
    ids=lambda node: type(node).__name__,
)
def test_neuron_from_an_instance(node, membrane, tmp_path):
    model = SpikingMambaForCausalLM.from_dense(tiny_model(), neuron=node, membrane=membrane, threshold=0.5)
    for projection in model.projections().values():
        assert type(projection.neuron) is type(node)
        assert projection.neuron is not node
        assert repr(projection.neuron) == repr(node)
    train_save_load(model, tmp_path / "model")


def test_an_instance_from_inside_a_function_is_trusted_and_named():
    class Local(jelly.IFNode):
        def __init__(self, v_threshold: float = 0.3) -> None:
            super().__init__(v_threshold=v_threshold)

    model = SpikingMambaForCausalLM.from_dense(tiny_model(), neuron=Local(0.25))
    assert model.config.neuron["class"].endswith("Local")
    assert model.config.neuron["args"] == {"v_threshold": 0.25}


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.nn.Linear",
        "neurons.build",
        "neurons.si_lif.SILIFNode",
        "neurons.registry.importlib",
        "spikingjelly.activation_based.neuron.base_node.BaseNode",
        "spikingjelly.activation_based.neuron.torch.nn.ReLU",
        "somebody.elses.Node",
        ["neurons.SILIFNode"],
    ],
)
def test_a_config_that_names_anything_else_is_refused_on_load(name, tmp_path):
    tiny_model(neuron=INTEGER).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["neuron"] = {"class": name, "args": {}}
    path.write_text(json.dumps(fields))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Exception, match="Unknown neuron or surrogate class"):
            load(tmp_path)


def test_a_refused_name_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Unknown neuron"):
        tiny_config(neuron={"class": "trap_module.Node"})


def test_a_surrogate_is_no_neuron():
    with pytest.raises(TypeError, match="must be a spikingjelly node"):
        tiny_config(neuron={"class": "neurons.SignedSpikeCount"})


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"max_spike_count": 0}, ValueError, "at least 1"),
        ({"max_spike_count": -3}, ValueError, "at least 1"),
        ({"max_spike_count": 4.0}, TypeError, "integer"),
        ({"tau": 1.0}, ValueError, "greater than 1"),
        ({"tau": 0.5}, ValueError, "greater than 1"),
        ({"v_threshold": 1}, TypeError, "must be a float"),
        ({"v_threshold": 0.0}, ValueError, "positive"),
        ({"v_threshold": -1.0}, ValueError, "positive"),
        ({"v_threshold": 0.5}, ValueError, "config's threshold"),
        ({"max_spike_cuont": 4}, TypeError, "did you mean 'max_spike_count'"),
    ],
)
def test_bad_arguments_of_a_neuron(args, error, message):
    with pytest.raises(error, match=message):
        tiny_config(neuron={"class": "neurons.SILIFNode", "args": args})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"neuron": "neurons.SILIFNode"}, TypeError, "described as"),
        ({"neuron": {"class": "neurons.SILIFNode", "arg": {}}}, TypeError, "described as"),
        ({"neuron": {"class": "neurons.SILFNode"}}, ValueError, "did you mean 'neurons.SILIFNode'"),
        ({"membrane": "sentence"}, ValueError, "membrane must be one of"),
        ({"threshold": 0.0}, ValueError, "finite and positive"),
        ({"threshold": -1.0}, ValueError, "finite and positive"),
        ({"threshold": float("nan")}, ValueError, "finite and positive"),
        ({"threshold": float("inf")}, ValueError, "finite and positive"),
        ({"threshold": True}, TypeError, "must be a number"),
        ({"threshold": "1"}, TypeError, "must be a number"),
        ({"threshold": {"in_proj": 1.0}}, TypeError, "out_proj"),
        ({"threshold": {"in_porj": 1.0, "out_proj": 1.0}}, ValueError, "did you mean 'in_proj'"),
        ({"threshold": [1.0]}, ValueError, "lists 1 layers, the model has 2"),
        ({"sgc": {"function": "tanh"}}, TypeError, "with a mode"),
        ({"sgc": {"mode": "blnd"}}, ValueError, "sgc.mode must be one of"),
        ({"sgc": {"mode": "blend", "function": "sin"}}, ValueError, "sgc.function must be one of"),
        ({"sgc": {"mode": "blend", "schedule": "step"}}, ValueError, "sgc.schedule must be one of"),
        ({"sgc": {"mode": "blend", "lambda": 0.5}}, ValueError, "did you mean 'lam'"),
        ({"sgc": {"mode": "blend", "lam": 1.5}}, ValueError, r"lie in \[0, 1\]"),
        ({"sgc": {"mode": "blend", "lam": "1"}}, TypeError, "sgc.lam must be a number"),
        ({"neuron": None, "sgc": {"mode": "blend"}}, ValueError, "need a neuron"),
        ({"neuron": None, "learn_threshold": True}, ValueError, "need a neuron"),
        ({"hidden_size": 48}, StrictDataclassError, "must equal num_heads"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        tiny_config(**{"neuron": INTEGER} | fields)


def test_defaults_and_round_trip(tmp_path):
    config = tiny_config(
        neuron=INTEGER, sgc={"mode": "replace"}, threshold=[1, {"in_proj": 2, "out_proj": 3}]
    )
    assert config.sgc == {"mode": "replace", "function": "scaled_tanh", "lam": 1.0, "schedule": "linear"}
    assert SpikingMambaConfig().neuron is None
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SpikingMambaConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.sgc == config.sgc
    assert [again.layer_threshold(i) for i in (0, 1)] == [
        {"in_proj": 1.0, "out_proj": 1.0},
        {"in_proj": 2.0, "out_proj": 3.0},
    ]


def test_slots_of_the_cache():
    assert tiny_config().number_of_conv_states == 1
    assert tiny_config(neuron=INTEGER).number_of_conv_states == 1
    assert tiny_config(neuron=INTEGER, membrane="sequence").number_of_conv_states == 3
