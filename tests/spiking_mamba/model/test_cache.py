"""The cache under each of its names, and what transformers has to keep for it to work."""

import dataclasses
import inspect
import warnings

import pytest
import torch
from transformers import Cache, DynamicCache

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, SpikingMambaModel
from spiking_mamba.model import block as blocks
from spiking_mamba.model import cache, classification, modeling
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

NAMES = ["cache", "cache_params", "past_key_values"]
MODELS = {"dense": {}, "token": {"neuron": INTEGER}, "sequence": {"neuron": LEAKY, "membrane": "sequence"}}


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


# --- three names of one thing ---


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_goes_in_and_comes_out_under_each_name(model, name):
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 5:]
        states = model(ids[:, :5], use_cache=True)
        logits = []
        for token in ids[:, 5:].split(1, dim=1):
            states = model(token, use_cache=True, **{name: getattr(states, name)})
            logits.append(states.logits)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-4


def test_outputs_are_read_under_each_name_without_a_warning(model, caplog):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (model, model.backbone):
            output = part(tokens(1, 3), use_cache=True)
            assert isinstance(output.cache, Cache)
            assert output.cache is output.cache_params is output.past_key_values
            assert sum(value is output.cache for value in output.to_tuple()) == 1
            assert part(tokens(1, 3), use_cache=False).cache is None
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
def test_block_and_mixer_take_each_name(model, name):
    states, hidden = cache.new_cache(model.config), torch.randn(1, 6, 32)
    block = model.backbone.layers[0]
    for part in (block, block.mixer):
        states = cache.new_cache(model.config)
        with torch.no_grad():
            expected = part(hidden)
            pieces = [part(piece, **{name: states}) for piece in hidden.split([4, 1, 1], dim=1)]
        assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_goes_on_from_a_cache_of_each_name(model, name, how):
    ids = tokens(1, 9)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)} | how
    whole = model.generate(ids, **settings)
    with torch.no_grad():
        states = model(ids[:, :6].repeat(how.get("num_beams", 1), 1), use_cache=True).cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = model.generate(ids[:, 6:], **settings | {name: states, "attention_mask": None})
    assert torch.equal(rest[:, 3:], whole[:, 9:])


@pytest.mark.parametrize("pair", [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2])])
def test_two_different_caches_are_an_error(model, pair):
    one, other = (cache.new_cache(model.config) for _ in pair)
    block, hidden = model.backbone.layers[0], torch.randn(1, 2, 32)
    calls = [(model, tokens(1, 2)), (model.backbone, tokens(1, 2)), (block, hidden), (block.mixer, hidden)]
    for part, inputs in [*calls, (model.generate, tokens(1, 2))]:
        with pytest.raises(ValueError, match=r"and .* are names of one thing"):
            part(inputs, **dict(zip(pair, (one, other), strict=True)))
    with torch.no_grad():
        assert model(tokens(1, 2), use_cache=True, **dict.fromkeys(pair, one)).cache is one


def test_none_is_no_cache(model):
    with torch.no_grad():
        expected = model(tokens(1, 4)).logits
        assert torch.equal(model(tokens(1, 4), **dict.fromkeys(NAMES)).logits, expected)
        one = cache.new_cache(model.config)
        assert model(tokens(1, 4), cache=None, cache_params=one, use_cache=True).cache is one


@pytest.mark.parametrize("wrong", [(), [torch.zeros(1)], "dynamic"])
def test_what_is_no_cache_is_refused(model, wrong):
    with pytest.raises(TypeError, match="past_key_values must be a transformers Cache"):
        model(tokens(1, 2), past_key_values=wrong)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_training_with_checkpointing_refuses_a_cache():
    model = tiny_model(neuron=INTEGER).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="twice"):
        model(tokens(1, 3), cache=cache.new_cache(model.config))
    assert model(tokens(1, 3), use_cache=True).cache is None
    with torch.no_grad():  # nothing is recomputed
        assert model(tokens(1, 3), use_cache=True).cache is not None


# --- what generate() does with it ---


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_hands_the_cache_on(model, how, monkeypatch):
    """A cache that is lost on its way costs no error: whole prompts would be computed again, or forgotten."""
    seen, forward = [], SpikingMambaModel.forward

    def watched(self, input_ids=None, **arguments):
        states = arguments["cache"]
        seen.append((input_ids.shape[1], states, cache.batch_size(states)))
        return forward(self, input_ids, **arguments)

    monkeypatch.setattr(SpikingMambaModel, "forward", watched)
    model.generate(tokens(2, 5), max_new_tokens=4, min_new_tokens=4, **{"do_sample": False} | how)
    rows = 2 * how.get("num_beams", 1)
    lengths, caches, sizes = zip(*seen, strict=True)
    assert lengths == (5, 1, 1, 1)
    assert sizes == (None, rows, rows, rows)
    assert len({id(states) for states in caches}) == 1


def test_the_names_are_transformers_own():
    assert cache.GENERATION_NAME in NAMES
    assert cache.OUTPUT_NAME in NAMES
    fields = {f.name for f in dataclasses.fields(cache.SpikingMambaCausalLMOutput)}
    assert fields >= {"loss", "logits", "hidden_states", cache.OUTPUT_NAME}
    assert len(fields & set(NAMES)) == 1


# --- the contract ---

# What ours put in the place of transformers': another set means that a name was lost, or gained by accident.
OVERRIDES = {
    SpikingMambaConfig: {"__init__", "__post_init__", "model_type", "validate", "validate_architecture"},
    modeling.SpikingMambaPreTrainedModel: {
        "_init_weights", "_is_stateful", "_keep_in_fp32_modules_strict", "_no_split_modules",
        "base_model_prefix", "config_class", "from_pretrained", "save_pretrained",
        "supports_gradient_checkpointing",
    },
    SpikingMambaModel: {
        "__init__", "_keys_to_ignore_on_load_unexpected", "config_class", "forward", "get_input_embeddings",
        "set_input_embeddings",
    },
    SpikingMambaForCausalLM: {
        "__init__", "_apply", "_tied_weights_keys", "config_class", "forward", "generate",
        "get_input_embeddings", "prepare_inputs_for_generation", "set_input_embeddings",
    },
    classification.SpikingMambaForSequenceClassification: {
        "__init__", "_keys_to_ignore_on_load_unexpected", "config_class", "forward", "get_input_embeddings",
        "set_input_embeddings",
    },
    blocks.SpikingMambaBlock: {"__init__", "forward"},
}  # fmt: skip


def overridden(cls):
    """Names that a class of ours defines and one of its bases from elsewhere does, too."""
    bases = [base for base in cls.__mro__[1:-1] if not base.__module__.startswith("spiking_mamba")]
    names = {name for name in vars(cls) if any(name in vars(base) for base in bases)}
    of_python = {
        name for name in names if name.startswith("__") and name not in ("__init__", "__post_init__")
    }
    return names - of_python - {"_abc_impl", "_auto_class"}


@pytest.mark.parametrize("cls", OVERRIDES, ids=lambda cls: cls.__name__)
def test_every_override_is_one(cls):
    assert overridden(cls) == OVERRIDES[cls]


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls, names in OVERRIDES.items()
        for name in sorted(names)
        if inspect.isfunction(getattr(cls, name)) or inspect.ismethod(getattr(cls, name))
        if name not in ("__init__", "__post_init__", "forward")
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_override_takes_what_its_parent_takes(cls, name):
    bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith("spiking_mamba")]
    parent = next(base for base in bases if name in vars(base))
    ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (cls, parent))
    kinds = {p.kind for p in ours.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        named = {n for n, p in theirs.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert named <= set(ours)
    positional = [n for n, p in theirs.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        assert list(ours)[: len(positional)] == positional


def test_the_forwards_are_ours():
    model = tiny_model(neuron=INTEGER)
    for module in model.modules():
        forward = type(module).forward
        home = inspect.unwrap(forward).__module__
        assert home.startswith(("spiking_mamba", "neurons", "torch", "spikingjelly")), home


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_conv_state", (0,)), ("get_recurrent_state", (0,)), ("reorder_cache", (torch.tensor([1, 0]),)),
    ],
)  # fmt: skip
def test_what_the_cache_has_to_offer(name, arguments):
    model = tiny_model(neuron=LEAKY, membrane="sequence")
    states = DynamicCache(config=model.config)
    assert len(states.layers) == model.config.num_hidden_layers
    assert cache.conv_state(states, 0) is cache.scan_state(states, 0) is cache.batch_size(states) is None
    assert not list(cache.tensors(states))
    with torch.no_grad():
        model(tokens(2, 3), cache=states)
    held = list(cache.tensors(states))
    # convolution, scan and the states of two neurons a layer
    assert len(held) == 4 * model.config.num_hidden_layers
    before = [values[key].clone() for values, key in held]
    getattr(states, name)(*arguments)
    after = [values[key] for values, key in cache.tensors(states)]
    if name == "reorder_cache":
        before = [state.flip(0) for state in before]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
