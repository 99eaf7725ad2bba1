"""Calibrated thresholds: the rule against one worked out neuron by neuron, and what it is good for."""

import functools
import math
from pathlib import Path

import datasets
import pytest
import torch

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.training.calibration import calibrate_levels, calibrate_thresholds, resolve_threshold
from spiking_mamba.training.distillation import DistillationSettings, distill
from tests.helpers.tiny import INTEGER, tiny_model, tokens

TEACHER = Path(__file__).parents[3] / "recipes/quickstart/teacher"
FINE = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 256}}
TEXT = """The river runs through the valley, past the old mill and the two farms, and comes to the sea at the
town. In winter it is high and brown, and the people who live beside it keep their boats on the
meadow. Nobody has counted the fish, but there are fewer of them than there were, and the men who
caught them have gone to the factories in the city. The church stands on a hill from which one sees
the whole of it: water, roofs, fields."""


def flat(layers):
    return [value for layer in layers for value in layer.values()]


def spiking(teacher, threshold, ids, neuron=FINE):
    """Mean |s| of a student, and its mean KL from the teacher."""
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron=neuron, threshold=threshold).eval()
    with torch.no_grad(), count_spikes(student) as spikes:
        other = student(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        right = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return spikes.mean_abs, float((right.exp() * (right - other)).sum(-1).mean())


def expected_information(teacher, ids, name):
    """``sum_c E[sum over outputs of (dL/dy W)^2]``, over every token that could be drawn, not a sample."""
    module = dict(teacher.named_modules())[name]
    kept = []
    handle = module.register_forward_hook(lambda m, a, y: kept.append(y))
    logits = teacher(input_ids=ids, use_cache=False).logits
    handle.remove()
    log_probs, total = logits.log_softmax(-1), 0.0
    squared_weight = module.weight.detach().double().square().sum(1)  # of each output, over channels
    generator = torch.Generator().manual_seed(5)
    draws = 60
    for _ in range(draws):
        drawn = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1, generator=generator)
        loss = -log_probs.flatten(0, 1).gather(1, drawn).sum()
        (gradient,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
        total += float((gradient.double().square() @ squared_weight).sum()) / draws
    return total / ids.numel()


def test_the_rule_by_hand():
    teacher, ids = tiny_model(), tokens(16, 64)
    found = calibrate_thresholds(teacher, ids, 2.0, FINE)
    inputs = {}
    names = [f"backbone.layers.{i}.mixer.{p}" for i in range(2) for p in ("in_proj", "out_proj")]
    modules = dict(teacher.named_modules())
    for name in names:
        modules[name].register_forward_hook(lambda m, a, y, name=name: inputs.__setitem__(name, a[0]))
    teacher(input_ids=ids, use_cache=False)
    right = []
    for name in names:
        cost = modules[name].out_features * float(inputs[name].detach().abs().sum(-1).mean())
        right.append((cost / expected_information(teacher, ids, name)) ** (1 / 3))
    ratio = torch.tensor(flat(found)) / torch.tensor(right)
    assert ratio.max() / ratio.min() < 1.05  # they differ by how tokens are drawn
    assert max(right) / min(right) > 1.2  # or a common threshold would pass, too


@pytest.mark.parametrize("mean_abs", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_the_mean_asked_for(mean_abs, membrane):
    teacher, ids = tiny_model(), tokens(4, 64)
    found = calibrate_thresholds(teacher, ids, mean_abs, FINE, membrane=membrane)
    student = SpikingMambaForCausalLM.from_dense(teacher, FINE, membrane=membrane, threshold=found).eval()
    with torch.no_grad(), count_spikes(student) as spikes:
        student(input_ids=ids, use_cache=False)
    assert spikes.mean_abs == pytest.approx(mean_abs, rel=0.01)


@pytest.fixture(scope="module")
def english():
    tokenizer = load_tokenizer(TEACHER)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    half = ids.shape[1] // 2
    return load_dense(TEACHER).eval(), ids[:, :half], ids[:, half : 2 * half]


def test_less_is_lost_than_by_one_threshold_for_all(english):
    teacher, seen, unseen = english
    found = calibrate_thresholds(teacher, seen, 0.5, FINE)
    mean_abs, lost = spiking(teacher, found, unseen)
    low, high = 0.05, 3.0
    for _ in range(12):  # one threshold that makes as many spikes
        middle = math.sqrt(low * high)
        mean, lost_by_one = spiking(teacher, middle, unseen)
        low, high = (middle, high) if mean > mean_abs else (low, middle)
    assert mean == pytest.approx(mean_abs, rel=0.01)
    assert lost < 0.8 * lost_by_one


def test_the_teacher_stays_as_it_is():
    teacher, ids = tiny_model().train(), tokens(2, 32)
    teacher.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    asked = [p.requires_grad for p in teacher.parameters()]
    first = calibrate_thresholds(teacher, ids, 1.0, FINE)
    assert calibrate_thresholds(teacher.requires_grad_(False), ids, 1.0, FINE) == first
    assert not all(asked)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("mean_abs", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_mean_that_is_none(mean_abs):
    with pytest.raises(ValueError, match="mean_abs must be a positive number"):
        calibrate_thresholds(tiny_model(), tokens(1, 8), mean_abs, FINE)


@pytest.mark.parametrize(
    "calibrate", [calibrate_levels, functools.partial(calibrate_thresholds, mean_abs=1.0, neuron=FINE)]
)
@pytest.mark.parametrize(
    ("shape", "first", "said"),
    [
        ((2, 8), 8, "nothing is left without the first 8"),
        ((2, 8), -1, "nothing is left without the first -1"),
        ((2, 0), 0, r"rows of tokens, \[rows, length\], not \[2, 0\]"),
        ((0, 8), 0, r"not \[0, 8\]"),
        ((8,), 0, r"not \[8\]"),
    ],
)
def test_text_of_which_nothing_is_looked_at(calibrate, shape, first, said):
    with pytest.raises(ValueError, match=said):
        calibrate(tiny_model(), torch.zeros(shape, dtype=torch.long), first=first)


def test_what_cannot_be_reached():
    with pytest.raises(ValueError, match="No threshold gives a mean"):
        calibrate_thresholds(tiny_model(), tokens(2, 32), 9.0, INTEGER)  # counts end at 4
    with pytest.raises(ValueError, match="calibrated by a dense teacher"):
        calibrate_thresholds(tiny_model(neuron=INTEGER), tokens(2, 32), 1.0, INTEGER)


def test_a_recipe_asks_for_it(tmp_path):
    teacher = tiny_model()
    rows = datasets.Dataset.from_dict({"input_ids": tokens(12, 32).tolist()})
    threshold = resolve_threshold({"mean_abs": 1.5}, teacher, rows, neuron=FINE)
    assert threshold == calibrate_thresholds(teacher, tokens(12, 32), 1.5, FINE)
    assert resolve_threshold(0.5, teacher, rows, neuron=FINE) == 0.5
    with pytest.raises(ValueError, match="mean_ab"):
        resolve_threshold({"mean_abs": 1.5, "mean_ab": 1}, teacher, rows, neuron=FINE)
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True}
    kinds = []
    for number, each in enumerate((threshold, {"mean_abs": 1.5})):
        settings = DistillationSettings(
            teacher="", output=str(tmp_path / str(number)), neuron=FINE, threshold=each, compile=False,
            training=training,
        )  # fmt: skip
        folder, _ = distill(settings, teacher, rows=rows)
        kinds.append(SpikingMambaForCausalLM.from_pretrained(folder).state_dict())
    assert kinds[0].keys() == kinds[1].keys()
    assert all(torch.equal(value, kinds[1][name]) for name, value in kinds[0].items())


@pytest.mark.parametrize(("levels", "warns"), [(4, True), (64, False)])
def test_a_mean_that_only_clipping_reaches_is_warned_of(levels, warns, recwarn):
    teacher = load_dense(TEACHER)
    ids = torch.tensor([load_tokenizer(TEACHER)(TEXT)["input_ids"]])
    neuron = {"class": "neurons.SILIFNode", "args": {"max_spike_count": levels}}
    calibrate_thresholds(teacher, ids, 1.2, neuron)
    assert any("cut off" in str(warning.message) for warning in recwarn) == warns
