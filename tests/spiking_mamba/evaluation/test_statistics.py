"""Intervals against closed forms, tables and simulations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_mamba.evaluation.statistics import SOURCE_TASKS, gaps, groups, interval, kept_share, paired_gap
from tests.helpers.evaluations import evaluation_model, seeds

# Student's t, two-sided 95 %: any printed table
T95 = {2: 12.706, 3: 4.303, 5: 2.776, 11: 2.228, 31: 2.042}


@pytest.mark.parametrize(("runs", "t"), T95.items())
def test_t_interval_against_a_table(runs, t):
    values = [float(i) for i in range(runs)]  # mean (n - 1) / 2, variance n (n + 1) / 12
    found = interval(values)
    sd = math.sqrt(runs * (runs + 1) / 12)
    assert found["mean"] == pytest.approx((runs - 1) / 2)
    assert found["sd"] == pytest.approx(sd)
    assert found["high"] - found["mean"] == pytest.approx(t * sd / math.sqrt(runs), rel=2e-4)
    assert found["mean"] - found["low"] == pytest.approx(t * sd / math.sqrt(runs), rel=2e-4)
    assert found["runs"] == runs


def test_two_runs_by_the_cauchy_quantile():
    """With one degree of freedom t is Cauchy: tan(pi (p - 1/2)); and sd / sqrt(2) is half the distance."""
    found = interval([1.0, 3.0], confidence=0.9)
    assert found["high"] == pytest.approx(2 + math.tan(0.45 * math.pi))


def test_t_interval_covers():
    """Of many samples of three, 95 % of the intervals hold the true mean; normal ones would hold 80 %."""
    random = np.random.default_rng(0)
    found = [interval(sample) for sample in random.normal(5.0, 2.0, (4000, 3))]
    share = np.mean([row["low"] <= 5.0 <= row["high"] for row in found])
    assert share == pytest.approx(0.95, abs=0.012)


def test_one_run_has_no_interval():
    assert interval([0.4]) == {"mean": 0.4, "sd": None, "low": None, "high": None, "runs": 1}
    assert interval([math.inf, 2.0])["sd"] is None
    with pytest.raises(ValueError, match="no run"):
        interval([])


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8),
    shift=st.floats(-100, 100),
    scale=st.floats(0.1, 10),
)
def test_interval_moves_with_its_values(values, shift, scale):
    plain, moved = interval(values), interval([scale * v + shift for v in values])
    for key in ("mean", "low", "high"):
        assert moved[key] == pytest.approx(scale * plain[key] + shift, rel=1e-6, abs=1e-6)
    assert plain["low"] <= plain["mean"] <= plain["high"]


def naive_bootstrap(tasks, resamples, seed):
    """Item by item, as a textbook has it."""
    random = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        means = []
        for reference, model in tasks:
            index = random.integers(len(reference), size=len(reference))
            means.append(np.mean([reference[j] - model[j] for j in index]))
        draws[i] = np.mean(means)
    return np.quantile(draws, [0.025, 0.975])


def correlated(n, seed, apart=0.3, noise=0.5):
    """0/1 scores of two models that find the same items hard."""
    random = np.random.default_rng(seed)
    hard = random.normal(0, 1, n)
    return [(random.normal(skill, noise, n) > hard).astype(int) for skill in (apart, 0.0)]


def test_bootstrap_equals_the_textbook():
    tasks = {"a": correlated(60, 1), "b": correlated(200, 2)}
    sides = [{task: pair[i] for task, pair in tasks.items()} for i in (0, 1)]
    found = paired_gap(*sides, resamples=20_000)
    low, high = naive_bootstrap(list(tasks.values()), 3000, seed=5)
    assert found["gap"] == pytest.approx(
        np.mean([np.mean(reference) - np.mean(model) for reference, model in tasks.values()])
    )
    assert found["low"] == pytest.approx(low, abs=0.008)
    assert found["high"] == pytest.approx(high, abs=0.008)
    assert found["items"] == 260


def test_bootstrap_of_scores_that_are_not_binary():
    random = np.random.default_rng(3)
    reference, model = random.normal(0, 1, (2, 150))
    found = paired_gap({"a": reference}, {"a": model}, resamples=20_000)
    low, high = naive_bootstrap([(reference, model)], 3000, seed=5)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.03)


@pytest.mark.parametrize("n", [2000, 10_000])
def test_bootstrap_is_normal_for_many_items(n):
    reference, model = correlated(n, 4)
    difference = reference - model
    half = 1.959964 * difference.std() / math.sqrt(n)
    found = paired_gap({"a": reference}, {"a": model})
    assert found["low"] == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_average_is_stratified():
    """Tasks count alike whatever their size: the variance is the mean's over tasks, not over all items."""
    tasks = {"small": correlated(500, 5), "large": correlated(20_000, 6, apart=0.0)}
    sides = [{task: pair[i] for task, pair in tasks.items()} for i in (0, 1)]
    found = paired_gap(*sides)
    variances = [(pair[0] - pair[1]).var() / len(pair[0]) for pair in tasks.values()]
    half = 1.959964 * math.sqrt(sum(variances)) / 2
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.05)
    assert found["gap"] == pytest.approx(np.mean([np.mean(r - m) for r, m in tasks.values()]))


def test_identical_items_have_no_gap():
    items = {"a": [0, 1, 1, 0], "b": [1] * 7}
    found = paired_gap(items, items)
    assert [found["gap"], found["low"], found["high"]] == [0.0, 0.0, 0.0]


def test_pairing_narrows_the_interval():
    reference, model = correlated(3000, 7)
    shuffled = np.random.default_rng(0).permutation(model)
    paired, unpaired = (paired_gap({"a": reference}, {"a": m}) for m in (model, shuffled))
    assert paired["gap"] == pytest.approx(unpaired["gap"])
    assert paired["high"] - paired["low"] < 0.75 * (unpaired["high"] - unpaired["low"])


def test_bootstrap_covers():
    """Of many evaluations, 95 % of the intervals hold the true gap."""
    random = np.random.default_rng(11)
    right = random.random((600, 2, 400)) < np.array([0.6, 0.5])[:, None]  # [trial, model, item]
    found = [
        paired_gap({"a": trial[0]}, {"a": trial[1]}, resamples=1000, seed=i) for i, trial in enumerate(right)
    ]
    share = np.mean([row["low"] <= 0.1 <= row["high"] for row in found])
    assert share == pytest.approx(0.95, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_swapping_the_sides_turns_the_gap(pairs, seed):
    reference, model = ([pair[i] for pair in pairs] for i in (0, 1))
    one = paired_gap({"a": reference}, {"a": model}, resamples=2000, seed=seed)
    other = paired_gap({"a": model}, {"a": reference}, resamples=2000, seed=seed)
    assert one == paired_gap({"a": reference}, {"a": model}, resamples=2000, seed=seed)
    assert one["gap"] == pytest.approx(-other["gap"])
    assert -1 <= one["low"] <= one["high"] <= 1
    step = 3 / len(pairs)  # other draws, so equal up to a few items
    assert one["low"] == pytest.approx(-other["high"], abs=step)


@pytest.mark.parametrize(
    ("reference", "model", "message"),
    [
        ({"a": [1, 0]}, {"a": [1]}, "a has 2 items on one side and 1"),
        ({"a": []}, {"a": []}, "0 items"),
        ({"a": [1]}, {"b": [1]}, "same tasks"),
        ({}, {}, "same tasks"),
    ],
)
def test_unequal_items_are_an_error(reference, model, message):
    with pytest.raises(ValueError, match=message):
        paired_gap(reference, model)


def test_groups_of_an_evaluation():
    models = seeds(3, items=100)
    found = groups(models)
    assert set(found) == {"teacher", "student"}
    assert found["teacher"]["piqa"]["runs"] == 1
    assert "mean_abs" not in found["teacher"]
    student = found["student"]
    assert set(student) == {
        *SOURCE_TASKS, "sciq", "average", "mean_abs", "gain_fp32", "gain_fp16", "gain_int8",
        "perplexity:wikipedia-leads", "perplexity:state-of-the-union",
    }  # fmt: skip
    accuracies = [m["tasks"]["hellaswag"]["metrics"]["acc_norm"]["value"] for m in models[1:]]  # its main
    assert student["hellaswag"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert student["gain_fp32"] == interval([m["energy"]["projections"]["fp32"]["gain"] for m in models[1:]])


def test_gaps_of_an_evaluation():
    models = seeds(2, items=150)
    rows = gaps(models, resamples=500)
    assert [(row["model"], row["task"]) for row in rows] == [
        (f"student-seed{seed}", task) for seed in (0, 1) for task in (*SOURCE_TASKS, "sciq", "average")
    ]
    for row in rows:
        model = next(m for m in models if m["name"] == row["model"])
        assert row["reference"] == "teacher"
        if row["task"] == "average":
            assert row["gap"] == pytest.approx(models[0]["average"] - model["average"])
            assert row["items"] == 6 * 150
        else:
            main = model["tasks"][row["task"]]["main"]
            scores = [m["tasks"][row["task"]]["metrics"][main]["value"] for m in (models[0], model)]
            assert row["gap"] == pytest.approx(scores[0] - scores[1])
        assert row["low"] <= row["gap"] <= row["high"]
    alone = gaps([models[0], models[2]], resamples=500)
    assert alone == [row for row in rows if row["model"] == "student-seed1"]  # whoever else is there


def test_no_reference_no_gaps():
    assert gaps([evaluation_model("a"), evaluation_model("b")]) == []


def test_tasks_that_one_lacks_are_left_out():
    teacher = evaluation_model("teacher", reference=True, tasks=("piqa", "boolq"))
    student = evaluation_model("student", tasks=("boolq", "sciq"))
    assert [row["task"] for row in gaps([teacher, student])] == ["boolq"]


def test_other_items_are_an_error():
    teacher, student = seeds(1, items=20)
    student["tasks"]["piqa"]["items"]["acc"].pop()
    with pytest.raises(ValueError, match="teacher and student-seed0 have 20 and 19 items of piqa"):
        gaps([teacher, student])
    teacher, student = seeds(1, items=20)
    student["tasks"]["piqa"]["data"]["sha256"] = "other"
    with pytest.raises(ValueError, match="checksums"):
        gaps([teacher, student])


def test_the_share_of_ability_that_is_kept():
    reference = {"a": [1] * 70 + [0] * 30, "b": [1] * 60 + [0] * 40}
    model = {"a": [1] * 60 + [0] * 40, "b": [0] * 5 + [1] * 55 + [0] * 40}
    chance = {"a": 0.5, "b": 0.25}
    found = kept_share(reference, model, chance, resamples=4000)
    assert found["share"] == pytest.approx((0.10 + 0.30) / (0.20 + 0.35))
    # by the delta method: the ratio of two sums of means, items in pairs
    variance, above = 0.0, np.array([0.55, 0.40])
    for task in reference:
        pairs = np.array([reference[task], model[task]], float)
        variance += np.var(pairs[1] / above[0] - pairs[0] * above[1] / above[0] ** 2) / 100
    half = 1.96 * np.sqrt(variance)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.15)
    assert found["low"] < found["share"] < found["high"]
    assert kept_share(reference, reference, chance) == {"share": 1, "low": 1, "high": 1}
    with pytest.raises(ValueError, match="no better than guessing"):
        kept_share({"a": [0, 1]}, {"a": [1, 1]}, {"a": 0.5})
    with pytest.raises(ValueError, match="a has 2 and 3 items"):
        kept_share({"a": [1, 1]}, {"a": [1, 1, 1]}, {"a": 0.5})
    with pytest.raises(ValueError, match="same tasks"):
        kept_share({"a": [1, 1]}, {"b": [1, 1]}, {"a": 0.5})


def test_what_is_kept_of_next_to_nothing():
    def kept(right, of, chance=0.5):
        reference = {"a": [1] * right + [0] * (of - right)}
        return kept_share(reference, {"a": [1] * (right - 3) + [0] * (of - right + 3)}, {"a": chance})

    with pytest.raises(ValueError, match="has no bounds"):
        kept(55, 100)  # one standard error above guessing
    found = kept(140, 240)  # two and a half: some resamples guess
    assert -1e6 < found["low"] < found["share"] < found["high"] < 1e6
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        interval([1.0, 2.0], confidence=95)
