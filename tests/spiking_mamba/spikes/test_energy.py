"""Energy by hand, and the cost tables of users."""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, event_driven
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import ProjectionSpikes, SpikeCounts
from spiking_mamba.spikes.energy import (
    COSTS_45NM,
    Costs,
    costs_45nm,
    energy_of_rates,
    load_costs,
    model_energy,
    operations,
    projection_energy,
)
from spiking_mamba.spikes.operations import traffic
from tests.helpers.tiny import INTEGER, LEAKY, tiny_config, tiny_model, tokens

DOC = Path(__file__).parents[3] / "docs" / "energy.md"
SIZES = {
    "vocab_size": 5,
    "hidden_size": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 2,
    "state_size": 3,
    "n_groups": 1,
    "conv_kernel": 4,
    "neuron": INTEGER,  # D = 4
}


def counts_of(spike, out_features, max_spike_count=4):
    counted = ProjectionSpikes(len(spike[0]), out_features, max_spike_count)
    counted.add(torch.tensor([spike]))
    return counted


def two_layers():
    """Two tokens through hidden size 2, inner size 4, so in_proj 2 -> 16 and out_proj 4 -> 2."""
    return SpikeCounts(
        {
            "backbone.layers.0.mixer.in_proj": counts_of([[4.0, -1.0], [1.0, 0.0]], 16),  # 6, 3 not zero
            "backbone.layers.0.mixer.out_proj": counts_of([[4.0, -4, 0, 2], [0, 0, 0, 0.0]], 2),  # 10, 3
            "backbone.layers.1.mixer.in_proj": counts_of([[0.0, -1.0], [1.0, 0.0]], 16),  # 2, 2
            "backbone.layers.1.mixer.out_proj": counts_of([[0.0] * 4, [0.0] * 4], 2),  # silent
        }
    )


def everywhere(spike):
    rows = two_layers().projections.items()
    return SpikeCounts({name: counts_of([[spike] * p.in_features], p.out_features) for name, p in rows})


def test_operations_by_hand():
    assert operations(SpikingMambaConfig(**SIZES)) == {
        "embedding": 0,
        "in_proj": 2 * 2 * 16,  # z 4, x 4, B 3, C 3, dt 2
        "conv": 2 * (10 * 4 + 10),  # 10 channels: 4 taps and SiLU
        "scan": 2 * (3 * 2 + 2 * 4 + 3 * 4 * 3),
        "norms": 2 * (3 * 2 + 5 * 4) + 3 * 2,
        "out_proj": 2 * 4 * 2,
        "lm_head": 2 * 5,
        "additions": 2 * (2 + 10),  # residual, bias of the convolution
    }
    assert operations(SpikingMambaConfig(**SIZES, use_bias=True))["additions"] == 2 * (2 + 10 + 16 + 2)
    assert operations(SpikingMambaConfig(**SIZES, use_conv_bias=False))["additions"] == 2 * 2


def test_two_layers_by_hand():
    report = model_energy(two_layers(), SpikingMambaConfig(**SIZES), batch=2, length=3)
    # a token: 16 * (6 + 2) / 2 + 2 * 10 / 2 = 74 accumulations; 16 * (3 + 2) / 2 + 2 * 3 / 2 = 43 MACs are
    # of what is not zero
    dense, spiking, quantised, sparse = 80 * 4.6, 74 * 0.9, 80 * 0.3, 43 * 0.3
    # counts of size 1, 2 and 4 have one digit each: one where the unary code has |s|
    digits = 43 * 0.9
    assert report["projections"]["fp32"] == pytest.approx(
        {
            "dense_pj_per_token": 368.0,
            "spiking_pj_per_token": 66.6,
            "quantised_pj_per_token": 24.0,
            "quantised_sparse_pj_per_token": 12.9,
            "shift_and_add_pj_per_token": 38.7,
            "gain": 368.0 / 66.6,
            "gain_over_quantised": 24.0 / 66.6,
            "gain_over_quantised_sparse": 12.9 / 66.6,
            "gain_over_shift_and_add": 38.7 / 66.6,
        }
    )
    # 12 neurons of 4 micro-steps
    neurons = report["projections_with_neurons"]["fp32"]
    assert neurons["dense_pj_per_token"] == pytest.approx(dense)
    assert neurons["spiking_pj_per_token"] == pytest.approx(spiking + 43.2)
    assert neurons["quantised_pj_per_token"] == pytest.approx(quantised + 55.2)
    assert neurons["shift_and_add_pj_per_token"] == pytest.approx(digits + 55.2 + 10.8)
    assert neurons["gain"] == pytest.approx(368 / 109.8)
    # conv 100, scan 100, norms 58, head 10 MACs; 24 additions; 12 neurons of 4 micro-steps
    rest = 268 * 4.6 + 24 * 0.9
    model = report["model"]["fp32"]
    assert model["dense_pj_per_token"] == pytest.approx(dense + rest)
    assert model["spiking_pj_per_token"] == pytest.approx(spiking + rest + 12 * 4 * 0.9)
    assert model["quantised_pj_per_token"] == pytest.approx(quantised + rest + 12 * 4.6)
    assert model["quantised_sparse_pj_per_token"] == pytest.approx(sparse + rest + 12 * 4.6)
    assert model["gain"] == pytest.approx((368 + 1254.4) / (66.6 + 43.2 + 1254.4))
    assert report["multiplied"]["fp32"] == pytest.approx(268 * 4.6 / (66.6 + 43.2 + 1254.4))

    # Prefill of 6 tokens. Projections: 80 weights / 6; 12 inputs, written and read; 36 outputs. The rest:
    # 136 weights / 6 (a layer: 40 taps, 10 biases, 6 of dt, A, D, norms 2 + 4; then 2 and the head's 10);
    # states 2 * 2 * (40 + 12) / 3; 2 * 52 activations a layer (2 + 6, 20, 10 + 2 + 4, 8) and 15 more.
    pj = 24.96
    others = (136 / 6 + 208 / 3 + 119) * 4 * pj
    moved = report["with_memory"]
    assert moved["projections"]["fp32"]["dense_pj_per_token"] == pytest.approx(
        dense + (80 / 6 + 24 + 36) * 4 * pj
    )
    assert moved["projections"]["fp32"]["spiking_pj_per_token"] == pytest.approx(
        spiking + ((80 / 6 + 36) * 4 + 24) * pj
    )
    assert moved["projections"]["fp32"]["quantised_pj_per_token"] == pytest.approx(
        quantised + (80 / 6 + 36 * 4 + 24) * pj
    )
    prefill = moved["model"]["fp32"]
    assert prefill["dense_pj_per_token"] == pytest.approx(1622.4 + (80 / 6 + 60) * 4 * pj + others)
    assert prefill["spiking_pj_per_token"] == pytest.approx(1364.2 + ((80 / 6 + 36) * 4 + 24) * pj + others)
    # Decoding, 2 tokens a pass: weights by 2, states at every token.
    others = (136 / 2 + 208 + 119) * 4 * pj
    assert moved["decode"]["fp32"]["dense_pj_per_token"] == pytest.approx(1622.4 + 100 * 4 * pj + others)
    assert moved["decode"]["fp32"]["quantised_sparse_pj_per_token"] == pytest.approx(
        sparse + rest + 55.2 + (40 + 36 * 4 + 24) * pj + others
    )
    decode = moved["decode_projections"]["int8"]
    assert decode["dense_pj_per_token"] == pytest.approx(80 * 0.3 + (40 + 24 + 36) * pj)
    assert decode["spiking_pj_per_token"] == pytest.approx(74 * 0.1 + (40 + 24 + 36) * pj)
    assert decode["shift_and_add_pj_per_token"] == pytest.approx(43 * 0.1 + (40 + 24 + 36) * pj)
    assert decode["gain_over_quantised"] == pytest.approx(decode["gain"]), "the same machine at int8"

    row = report["layers"][1]
    assert row["name"] == "backbone.layers.0.mixer.out_proj"
    assert (row["accumulations_per_token"], row["dense_macs_per_token"]) == (10, 8)
    assert (row["mean_abs"], row["nonzero_share"]) == (10 / 8, 3 / 8)
    assert row["energy"]["fp32"]["gain"] == pytest.approx(8 * 4.6 / 9)
    assert report["layers"][3]["energy"]["fp32"]["gain"] is None
    assert report["operations_per_token"]["neurons"] == 48
    assert report["hypothetical"] == ["fp16", "int8"]


def fewest_digits(number, longest):
    """Of all sums of ``longest`` signed powers of two at most, how many the shortest has: by trying."""
    powers = [sign * 2**k for k in range(8) for sign in (1, -1)]
    return next(n for n in range(longest + 1) if any(sum(c) == number for c in combinations(powers, n)))


def test_signed_digits_are_the_fewest():
    for size in range(65):
        counted = counts_of([[float(size), -float(size), 0.0]], 7, max_spike_count=64)
        assert counted.signed_digits == 2 * fewest_digits(size, 4), size
    assert counted.total == 128
    without = ProjectionSpikes(3, 7, 64, count_levels=False)
    without.add(torch.tensor([[[64.0, -64.0, 0.0]]]))
    assert without.signed_digits is None
    counts = SpikeCounts({"a": counted, "b": without})
    assert counts.digit_accumulations is None
    assert "shift_and_add" not in projection_energy(counts)
    assert SpikeCounts({"a": counted}).digit_accumulations == 2 * 7
    assert SpikeCounts({"a": counted}).neuron_steps == 3 * 64


def test_without_histograms_shift_and_add_is_not_known():
    counts = two_layers()
    for spikes in counts.projections.values():
        spikes.count_levels = False
    report = model_energy(counts, SpikingMambaConfig(**SIZES))
    json.dumps(report, allow_nan=False)
    for scope in ("projections", "projections_with_neurons", "model"):
        assert report[scope]["fp32"]["shift_and_add_pj_per_token"] is None
        assert report[scope]["fp32"]["gain_over_shift_and_add"] is None
        assert report[scope]["fp32"]["gain"] > 1


def test_means_are_all_that_matters():
    """The recorded means of a run give what its counts gave."""
    config = SpikingMambaConfig(**SIZES)
    counts = two_layers()
    digits = counts.digit_accumulations / counts.dense_macs
    whole = model_energy(counts, config, batch=2, length=3)
    means = energy_of_rates(config, counts.mean_abs, counts.nonzero_share, digits=digits, batch=2, length=3)
    assert means.keys() == whole.keys() - {"layers"}
    for scope in ("projections", "projections_with_neurons", "model"):
        for table in COSTS_45NM:
            assert means[scope][table] == pytest.approx(whole[scope][table])
    for scope, tables in whole["with_memory"].items():
        for table in tables:
            assert means["with_memory"][scope][table] == pytest.approx(tables[table])
    assert means["multiplied"] == pytest.approx(whole["multiplied"])
    assert energy_of_rates(config, 1.0, 0.5)["model"]["fp32"]["gain_over_shift_and_add"] is None
    with pytest.raises(ValueError, match="without neurons"):
        energy_of_rates(SpikingMambaConfig(**SIZES | {"neuron": None}), 1.0, 0.5)


def test_the_width_of_an_accumulator():
    """Horowitz: an addition of 8 and of 32 bits takes 0.03 and 0.1 pJ, a multiplication of 8 bits 0.2."""
    assert costs_45nm() == costs_45nm(32) == COSTS_45NM
    for bits, add in ((8, 0.03), (32, 0.1)):
        costs = costs_45nm(bits)
        assert (costs["int8"].mac, costs["int8"].ac) == pytest.approx((0.2 + add, add))
        assert [costs[name].quantised_mac for name in ("fp32", "fp16")] == pytest.approx([0.2 + add] * 2)
        assert (costs["fp32"].mac, costs["fp32"].ac) == (4.6, 0.9)
        row = model_energy(two_layers(), SpikingMambaConfig(**SIZES), costs=costs)["projections"]["int8"]
        assert row["gain_over_quantised_sparse"] == pytest.approx(43 * (0.2 + add) / (74 * add))
    with pytest.raises(ValueError, match="8 or 32 bits, got 16"):
        costs_45nm(16)


def test_weights_fetched_by_hand():
    config = SpikingMambaConfig(**SIZES)
    report = model_energy(two_layers(), config, length=2)
    # per token: (3 * 16 + 3 * 2 + 2 * 16) / 2 of 2 * (2 * 16 + 4 * 2)
    assert report["fetched"] == {
        "weights_per_token": 43.0,
        "share": 43 / 80,
        "accumulations_per_token": (6 * 16 + 10 * 2 + 2 * 16) / 2,
    }
    assert [row["weights_fetched_per_token"] for row in report["layers"]] == [24.0, 3.0, 16.0, 0.0]
    decode = report["with_memory"]["decode"]["fp32"]
    event = report["with_memory"]["event_driven"]["fp32"]
    spared = (80 * 4 - 43) * 24.96
    assert event["pj_per_token"] == pytest.approx(decode["spiking_pj_per_token"] - spared)
    assert event["gain"] == pytest.approx(decode["dense_pj_per_token"] / event["pj_per_token"])
    assert model_energy(two_layers(), config, batch=2)["with_memory"]["event_driven"] == {}


def test_counts_are_what_the_decoder_fetches():
    pytest.importorskip("numba")
    from spiking_mamba.model.cpu_decoder import CpuDecoder

    # of a shape that other tests compile, too
    made = event_driven(tiny_model(neuron=INTEGER, threshold=0.25, n_groups=2))
    ids = tokens(1, 12)
    with count_spikes(made) as counts, torch.no_grad():
        made(ids)
    decoder = CpuDecoder(made)
    for token in ids[0].tolist():
        decoder.step(token)
    sums = {"in_proj": 0.0, "out_proj": 0.0}
    for name, projection in counts.projections.items():
        sums[name.rpartition(".")[2]] += projection.nonzero
    assert sums["in_proj"] > 0
    assert decoder.fired[:2].tolist() == list(sums.values())
    weights = sum(p.nonzero_macs for p in counts.projections.values()) / 12
    assert model_energy(counts, made.config)["fetched"]["weights_per_token"] == pytest.approx(weights)
    with count_spikes(made) as watched:  # hooks see nothing of compiled code
        # with a mask: id 0 among the tokens would be taken for padding
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert watched.tokens == 12 + 4


def test_parts_of_a_real_model():
    """What the formulas say against what the model holds and what was counted."""
    config = tiny_config(neuron=INTEGER, threshold=0.5, tie_word_embeddings=True)
    model = SpikingMambaForCausalLM(config).eval()
    counted = operations(config)
    projections = counted["in_proj"] + counted["out_proj"]
    weights = 2 * (traffic(config, 1, 64)["rest"] - traffic(config, 2, 64)["rest"]) * 64
    assert projections + weights == pytest.approx(sum(p.numel() for p in model.parameters()))
    with torch.no_grad():
        cache = model(tokens(1, 5), use_cache=True).cache
    held = sum(s[0].numel() for layer in cache.layers for s in (layer.conv_states, layer.recurrent_states))
    step, run = traffic(config, 1, 1)["rest"], traffic(config, 2, 1)["rest"] + weights / 2
    states = (traffic(config, 1, 1)["rest"] - traffic(config, 1, 2)["rest"] - weights / 2) * 2
    assert step == pytest.approx(run)
    assert states == pytest.approx(2 * held)

    with count_spikes(model) as counts:
        model(tokens(2, 9))
    report = model_energy(counts, config)
    assert sum(row["dense_macs_per_token"] for row in report["layers"]) == projections
    found = sum(row["accumulations_per_token"] for row in report["layers"]) * 18  # of quotients
    assert found == pytest.approx(counts.accumulations, rel=1e-12)
    by_old_name = projection_energy(counts)
    for name in COSTS_45NM:
        assert report["projections"][name]["gain"] == pytest.approx(by_old_name[name])
    fair = report["projections"]["int8"]
    assert fair["gain_over_quantised"] == pytest.approx(by_old_name["quantised"])
    assert fair["gain_over_quantised_sparse"] == pytest.approx(by_old_name["quantised_sparse"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_potentials_that_stay_cost():
    """A neuron along the token axis leaks, and its potential is read and written."""
    plain, leaky = (
        model_energy(two_layers(), SpikingMambaConfig(**SIZES | {"neuron": neuron, "membrane": membrane}))
        for neuron, membrane in ((INTEGER, "token"), (LEAKY, "sequence"))
    )
    fp32 = [report["model"]["fp32"]["spiking_pj_per_token"] for report in (plain, leaky)]
    assert fp32[1] - fp32[0] == pytest.approx(12 * 4.6)
    fp32 = [report["with_memory"]["decode"]["fp32"]["spiking_pj_per_token"] for report in (plain, leaky)]
    assert fp32[1] - fp32[0] == pytest.approx(12 * 4.6 + 2 * 12 * 4 * 24.96)
    dense = [report["with_memory"]["decode"]["fp32"]["dense_pj_per_token"] for report in (plain, leaky)]
    assert dense[0] == dense[1]


@pytest.mark.parametrize(("table", "factor"), [("fp32", 4.6 / 0.9), ("fp16", 1.5 / 0.4), ("int8", 0.3 / 0.1)])
def test_the_gain_is_a_ratio_of_costs_over_the_rate(table, factor):
    """What the source's energy figures come down to, and what docs/energy.md says."""
    for rate in (0.5, 1.0, 3.0):
        spikes = torch.zeros(1, 12, 4)
        spikes[0, :, 0] = 4 * rate if rate < 1 else rate
        spikes[0, :, 1:] = 0 if rate < 1 else rate
        counted = ProjectionSpikes(4, 7, 4)
        counted.add(spikes)
        assert counted.mean_abs == rate
        assert projection_energy(SpikeCounts({"a": counted}))[table] == pytest.approx(factor / rate)
    assert f"{factor:.2f} / r" in DOC.read_text()


def test_the_doc_states_the_costs():
    text = DOC.read_text()
    for name, cost in COSTS_45NM.items():
        assert re.search(rf"\| {name} \| {cost.mac} \| {cost.ac} \| {cost.width:.0f} \|", text), name
    assert "24.96 pJ" in text


def test_the_docs_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOC.read_text()
    (table,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    Path("chip.yaml").write_text(table)
    ids = tokens(2, 9)
    names = {"model": tiny_model(neuron=INTEGER), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if "measure_joules" not in code or not torch.cuda.is_available():  # the model is on the CPU
            exec(compile(code, str(DOC), "exec"), names)
    assert set(names["report"]["model"]) == {*COSTS_45NM, "my chip, int8"}
    assert Path("spikes.png").exists()


def test_ratios_below_one_are_told():
    busy = everywhere(4.0)
    report = model_energy(busy, SpikingMambaConfig(**SIZES))
    assert report["projections"]["fp16"]["gain"] == pytest.approx(1.5 / (4 * 0.4))
    assert report["projections"]["fp16"]["gain"] < 1
    assert report["model"]["fp16"]["gain"] < 1
    assert projection_energy(busy)["fp16"] < 1


def test_without_a_spike():
    silent = everywhere(0.0)
    report = model_energy(silent, SpikingMambaConfig(**SIZES))
    json.dumps(report, allow_nan=False)
    row = report["projections"]["fp32"]
    assert (row["gain"], row["gain_over_quantised"], row["spiking_pj_per_token"]) == (None, None, 0)
    assert report["model"]["fp32"]["gain"] > 1
    ratios = projection_energy(silent)
    assert ratios.pop("with_neurons") == pytest.approx(80 * 4.6 / (48 * 0.9))  # which compare all the same
    assert set(ratios.values()) == {math.inf}
    free = model_energy(two_layers(), SpikingMambaConfig(**SIZES), costs={"free": Costs(1.0, 1.0, byte=0.0)})
    assert free["with_memory"]["model"] == free["model"]


@pytest.mark.parametrize(
    ("measured_in", "hypothetical"),
    [
        ("fp32", ["fp16", "int8"]),
        ("float16", ["fp32", "int8"]),
        ("bfloat16", ["fp32", "fp16", "int8"]),
    ],
)
def test_precisions_that_were_not_measured(measured_in, hypothetical):
    report = model_energy(two_layers(), SpikingMambaConfig(**SIZES), measured_in=measured_in)
    assert report["hypothetical"] == hypothetical


def test_counts_that_do_not_fit():
    config = SpikingMambaConfig(**SIZES)
    for wrong in ((config, two_layers()), (two_layers(), SIZES)):
        with pytest.raises(TypeError, match="of counts and of a model's config"):
            model_energy(*wrong)
    with pytest.raises(ValueError, match="0 projections are not those"):
        model_energy(SpikeCounts({}), config)
    with pytest.raises(ValueError, match="not those of a spiking model"):
        model_energy(two_layers(), tiny_config(neuron=INTEGER))
    model = tiny_model(neuron=INTEGER)
    with count_spikes(model) as counts:
        pass
    with pytest.raises(ValueError, match="No token has passed backbone"):
        model_energy(counts, model.config)
    for spikes in counts.projections.values():
        spikes.add(torch.full((1, 1, spikes.in_features), math.nan))
    with pytest.raises(ValueError, match="diverged"):
        model_energy(counts, model.config)
    with pytest.raises(ValueError, match="positive"):
        model_energy(two_layers(), config, batch=0)
    for shifts in (False, True):
        model = tiny_model(neuron=INTEGER, shift_inputs=shifts)
        with count_spikes(model) as counts:
            model(tokens(1, 4))
        with pytest.raises(ValueError, match="a dense model's, which has no spikes"):
            model_energy(counts, tiny_config())
        with pytest.raises(ValueError, match=f"not those of a model with shift_inputs={not shifts}"):
            model_energy(counts, tiny_config(neuron=INTEGER, shift_inputs=not shifts))


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "costs.yaml"
    path.write_text(
        "chip:\n  mac: 2\n  ac: 5e-1\nother: {mac: 1.0, ac: 1.0, byte: 0, width: 2, quantised_mac: 0.5}\n"
    )
    costs = load_costs(path)
    assert costs == {"chip": Costs(2.0, 0.5, 24.96), "other": Costs(1.0, 1.0, 0.0, 2.0, 0.5)}
    report = model_energy(two_layers(), SpikingMambaConfig(**SIZES), costs=COSTS_45NM | costs)
    assert report["projections"]["chip"]["gain"] == pytest.approx(80 * 2 / (74 * 0.5))
    assert report["projections"]["chip"]["quantised_pj_per_token"] == 160.0, (
        "its own MACs, not another chip's"
    )
    assert report["projections"]["other"]["quantised_pj_per_token"] == 40.0
    assert report["hypothetical"] == ["fp16", "int8", "chip", "other"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("chip: {mac: 2}", "chip lacks ac"),
        ("chip: {ac: 2}", "chip lacks mac"),
        ("chip: {mac: -2, ac: 1}", "mac must be a positive number, got -2"),
        ("chip: {mac: .nan, ac: 1}", "mac must be a positive number, got nan"),
        ("chip: {mac: .inf, ac: 1}", "mac must be a positive number"),
        ("chip: {mac: 1, ac: 0}", "ac must be a positive number, got 0"),
        ("chip: {mac: 1, ac: true}", "ac must be a positive number, got True"),
        ("chip: {mac: 1, ac: one}", "ac must be a positive number, got 'one'"),
        ("chip: {mac: 1, ac: null}", "ac must be a positive number, got None"),
        ("chip: {mac: 1, ac: 1, byte: -1}", "byte must be a positive number"),
        ("chip: {mac: 1, ac: 1, bytes: 1}", "did you mean 'byte'"),
        ("chip: 4", "chip must be a mapping"),
        ("1: {mac: 1, ac: 1}", "must be a string"),
        ("fp32: {mac: 1, ac: 1}", "fp32 is the name of a built-in table"),
        ("- mac", "must map names"),
        ("", "must map names"),
        ("{", "no YAML"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_bad_tables(tmp_path, text, complaint):
    path = tmp_path / "costs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)) as raised:
        load_costs(path)
    assert "costs.yaml" in str(raised.value)


def test_no_table():
    with pytest.raises(ValueError, match=r"no file of costs nowhere\.yaml"):
        load_costs("nowhere.yaml")
