"""The largest activations, against a loop over every token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mamba.evaluation.outliers import (
    number_of_outliers,
    overwrite_largest,
    replace_outliers,
    width_of,
)
from tests.helpers.tiny import INTEGER, tiny_model, tokens


def naive(x, fraction, value, per):
    """One entry at a time: repeatedly take the largest magnitude that was not taken yet."""
    x = x.clone()
    for part in x.reshape(-1, x.shape[-1] if per == "token" else x.numel()):  # a view: x changes with it
        left = set(range(len(part)))
        sizes = [abs(entry) for entry in part.tolist()]
        count = 0
        while count < fraction * len(part) - 1e-9:
            largest = max(left, key=lambda i: sizes[i])
            left.remove(largest)
            part[largest] = value
            count += 1
    return x


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    fraction=st.floats(1e-4, 1.0),
    value=st.sampled_from([0.0, 1.0, -2.5]),
    per=st.sampled_from(["token", "tensor"]),
)
def test_equals_a_loop(seed, shape, fraction, value, per):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = x.clone()
    assert torch.equal(overwrite_largest(x, fraction, value, per), naive(x, fraction, value, per))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_half_precision(dtype):
    x = torch.tensor([[1.0, -8.0, 3.0, 0.5]], dtype=dtype)
    changed = overwrite_largest(x, 0.5, 1.0)
    assert changed.dtype == dtype
    assert changed.tolist() == [[1.0, 1.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [(0.0, 768, 0), (0.0001, 768, 1), (0.01, 768, 8), (0.07, 100, 7), (0.29, 100, 29), (0.5, 1, 1)],
)  # fmt: skip
def test_number(fraction, size, count):
    assert number_of_outliers(fraction, size) == count


@pytest.mark.parametrize("neuron", [None, INTEGER])
@pytest.mark.parametrize("site", ["in_proj", "out_proj"])
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_projections_get_the_changed_input(neuron, site, per):
    """Every layer's projection computes what a naive change of its own input gives; the others see none."""
    model, ids = tiny_model(neuron=neuron), tokens(2, 7)
    seen = {}

    def record(name):
        def hook(module, args, output):
            seen[name] = (args[0].clone(), output.fed.clone())

        return hook

    mixers = [block.mixer for block in model.backbone.layers]
    given_to = {}
    handles = []
    for layer, mixer in enumerate(mixers):
        for name in ("in_proj", "out_proj"):
            encoder = getattr(mixer, mixer.encoders[name])
            handles.append(encoder.register_forward_hook(record((layer, name))))
            handles.append(
                encoder.register_forward_pre_hook(
                    lambda module, args, key=(layer, name): given_to.update({key: args[0].clone()})
                )
            )
    with torch.no_grad(), replace_outliers(model, site, 1.0, 0.1, per):
        model(ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for (layer, name), (x, y) in seen.items():
        original = given_to[layer, name]
        expected = naive(original, 0.1, 1.0, per) if name == site else original
        assert torch.equal(x, expected)
        assert (name == site) == (not torch.equal(x, original))
        with torch.no_grad():
            encoder = getattr(mixers[layer], mixers[layer].encoders[name])
            torch.testing.assert_close(encoder(expected).fed, y, rtol=0, atol=0)


@pytest.mark.parametrize("block", ["mamba", "mlp"])
@pytest.mark.parametrize("site", ["in_proj", "out_proj"])
@torch.no_grad()
def test_blocks_of_one_kind_alone(block, site):
    """What is written is found in front of the projections of that kind, and of no other."""
    kinds = ["mamba", "mlp", "mamba", "mlp"]
    model = tiny_model(num_hidden_layers=4, layers_block_type=kinds, intermediate_size=48)
    changed, fed = [], {}
    for k, layer in enumerate(model.backbone.layers):
        for name in ("in_proj", "out_proj"):
            linear = getattr(layer.mixer, name)
            linear.register_forward_pre_hook(lambda m, args, key=(k, name): fed.update({key: args[0]}))
            if kinds[k] == block and name == site:
                changed.append((k, name))
    with replace_outliers(model, site, 5.0, 0.1, block=block):
        model(tokens(2, 7))
    fives = {key for key, x in fed.items() if (x == 5.0).any()}
    assert fives == set(changed)
    assert width_of(model, site, block) == fed[changed[0]].shape[-1]
    assert all(
        int((fed[key] == 5.0).sum()) == 14 * number_of_outliers(0.1, fed[key].shape[-1]) for key in fives
    )
    with (
        pytest.raises(ValueError, match="block is 'attention'"),
        replace_outliers(model, site, 0.0, 0.1, block="attention"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="no mlp block"),
        replace_outliers(tiny_model(), site, 0.0, 0.1, block="mlp"),
    ):
        pass


@torch.no_grad()
def test_first_places_stay():
    model, ids = tiny_model(), tokens(2, 7)
    fed = []
    model.backbone.layers[0].mixer.in_proj.register_forward_pre_hook(lambda m, args: fed.append(args[0]))
    with replace_outliers(model, "in_proj", 5.0, 0.1, first=2):
        model(ids)
    model(ids)
    changed, plain = fed
    assert torch.equal(changed[:, :2], plain[:, :2])
    assert torch.equal(changed[:, 2:], naive(plain[:, 2:].contiguous(), 0.1, 5.0, "token"))


@torch.no_grad()
def test_hooks_are_gone_afterwards_even_after_an_error():
    model, ids = tiny_model(neuron=INTEGER), tokens(1, 5)
    before = model(ids).logits
    with replace_outliers(model, "in_proj", 0.0, 0.5):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)

    def fail():
        with replace_outliers(model, "out_proj", 0.0, 0.5):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_no_fraction_changes_nothing():
    model, ids = tiny_model(), tokens(1, 5)
    before = model(ids).logits
    with replace_outliers(model, "in_proj", 0.0, 0.0):
        assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_generation_sees_the_change_too():
    """Token by token with a cache as in one pass: per token, nothing depends on the others."""
    model, ids = tiny_model(neuron=INTEGER), tokens(1, 6)
    with replace_outliers(model, "out_proj", 0.0, 0.1):
        whole = model(ids).logits
        cache, steps = None, []
        for token in ids.unbind(1):
            out = model(token[:, None], cache=cache, use_cache=True)
            cache = out.cache
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "u"}, "in_proj, out_proj"),
        ({"per": "batch"}, "token, tensor"),
        ({"fraction": 1.5}, "from 0 to 1"),
        ({"fraction": -0.1}, "from 0 to 1"),
        ({"fraction": math.nan}, "from 0 to 1"),
        ({"value": math.inf}, "finite"),
    ],
)
def test_bad_input(change, message):
    arguments = {"site": "in_proj", "value": 0.0, "fraction": 0.1} | change
    with pytest.raises(ValueError, match=message), replace_outliers(tiny_model(), **arguments):
        pass


def test_a_model_without_projections_is_an_error():
    with (
        pytest.raises(ValueError, match="load_model"),
        replace_outliers(torch.nn.Linear(2, 2), "in_proj", 0, 0.1),
    ):
        pass
