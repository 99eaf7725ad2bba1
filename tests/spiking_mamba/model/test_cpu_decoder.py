"""The compiled decoder: its integers by ==, its logits against the torch model with the same weights."""

import time

import numpy as np
import pytest
import torch

import neurons
from spiking_mamba.model.event_driven import event_driven
from tests.helpers.tiny import DEAD_ZONE, INTEGER, tiny_model, tokens

pytest.importorskip("numba")

from neurons.cpu import instructions
from neurons.cpu.kernels import tile_outputs
from spiking_mamba.model.cpu_decoder import CpuDecoder

MLPS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mlp", "mamba", "mlp", "mamba"],
    "intermediate_size": 72,
}
SHAPE = {"n_groups": 2, "num_heads": 4, "head_dim": 16, "threshold": 0.25}


MISSING = ("dotprod", "avxvnni", "avx512vnni")


def decoded(decoder, ids):
    decoder.reset()
    return torch.from_numpy(np.stack([decoder.step(int(token)).copy() for token in ids[0]]))


def made_of(spec, weights="int8", states="float32", **fields):
    model = tiny_model(neuron=spec, **SHAPE | fields)
    if weights == "mixed":  # 4 bits may cost so much that some layers stay int8
        made = event_driven(model, "int4", states, calibration=tokens(4, 40), tolerance=0.0015)
        assert 0 < len(made.config.int8_layers) < 2 * len(model.backbone.layers)
        return made
    return event_driven(model, weights, states)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shares", [(0.1, 0.9), (0.9, 0.1)])
def test_logits_of_a_spiking_model(weights, shares):
    made = made_of(INTEGER, weights, use_bias=True)
    ids = tokens(1, 12)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    for threads in (1, 2, 3):
        decoder = CpuDecoder(made, threads, shares)
        for _ in range(2):  # the second sequence begins as the first
            assert torch.allclose(decoded(decoder, ids), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("spec", "shifted"), [(INTEGER, False), (INTEGER, True), (None, False)])
@pytest.mark.parametrize("shares", [(0.1, 0.9, 0.9, 0.1), (0.9, 0.1)])
def test_logits_with_mlp_blocks(spec, shifted, shares):
    made = made_of(spec, "int4", **MLPS, shift_inputs=shifted)
    ids = tokens(1, 12)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    for threads in (1, 2):
        found = decoded(CpuDecoder(made, threads, shares), ids)
        assert (found - wanted).norm() / wanted.norm() < (0.02 if spec is None else 1e-4)


def test_logits_of_a_dense_model_in_mixed_forms():
    made, ids = made_of(None, "mixed", threshold=1.0), tokens(1, 12)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    assert (decoded(CpuDecoder(made), ids) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    "fields", [{}, MLPS, MLPS | {"shift_inputs": True}], ids=["mixers", "mlps", "shifted"]
)
@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("threads", [1, 2])
def test_integers_equal_the_oracle(weights, threads, fields):
    check_integers(made_of(INTEGER, weights, **fields), threads)


def test_integers_of_a_dead_zone_equal_the_oracle():
    """Where inputs are shifted; where they are not, against the reference of the GPU's kernels."""
    made = made_of(DEAD_ZONE, **MLPS, shift_inputs=True)
    check_integers(made, 2)
    ids, decoder = tokens(1, 6), CpuDecoder(made, 2, (0.1, 0.9), keep=True)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    found = decoded(decoder, ids)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def check_integers(made, threads):
    decoder = CpuDecoder(made, threads, (0.1, 0.9), keep=True)
    width = made.config.hidden_size
    fired = 0
    for token in tokens(1, 6)[0].tolist():
        decoder.step(token)
        spikes = torch.from_numpy(decoder.spikes)
        fired += int(spikes.count_nonzero())
        for layer, block in enumerate(made.backbone.layers):
            inner = block.mixer.out_proj.in_features
            both = (
                (block.mixer.in_proj, spikes[layer, :width]),
                (block.mixer.out_proj, spikes[layer, width : width + inner]),
            )
            for (projection, own), sums in zip(both, decoder.sums, strict=True):
                oracle = neurons.functional.event_driven_linear(own, projection.integer_weight())
                assert np.array_equal(sums[layer, : len(oracle)], oracle.numpy())
    assert fired > 100


@pytest.mark.parametrize("name", [n for n in instructions.INSTRUCTIONS if instructions.runs_here(n)])
def test_every_kind_of_processor_has_the_same_spikes(name):
    made = made_of(INTEGER)
    ids = tokens(1, 5)
    decoder, other = CpuDecoder(made, keep=True), CpuDecoder(made, keep=True, instructions=name)
    assert torch.allclose(decoded(decoder, ids), decoded(other, ids), rtol=1e-4, atol=1e-5)
    assert np.array_equal(decoder.spikes, other.spikes)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_logits_of_a_dense_model(weights):
    made = made_of(None, weights, threshold=1.0)
    ids = tokens(1, 12)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    found = decoded(CpuDecoder(made, 2), ids)
    # a last bit moves an activation over the edge between two integers
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_states_in_16_bits_stay_close():
    ids = tokens(1, 12)
    made = made_of(None, states="bfloat16", threshold=1.0)
    with torch.no_grad():
        wanted = made(ids).logits[0]
    found = decoded(CpuDecoder(made), ids)
    assert (found - wanted).norm() / wanted.norm() < 0.03


def test_without_biases_and_with_limited_time_steps():
    made = made_of(INTEGER, use_conv_bias=False, time_step_limit=(0.02, 0.05))
    with torch.no_grad():
        wanted = made(tokens(1, 6)).logits[0]
    assert torch.allclose(decoded(CpuDecoder(made), tokens(1, 6)), wanted, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 16"):
        CpuDecoder(made_of(INTEGER, num_heads=8, head_dim=8))
    with pytest.raises(ValueError, match="SiLU"):
        CpuDecoder(made_of(INTEGER, hidden_act="gelu"))
    with pytest.raises(ValueError, match="threads"):
        CpuDecoder(made_of(INTEGER), 0)
    decoder = CpuDecoder(made_of(INTEGER))
    for token in (-1, 61):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            decoder.step(token)
    with pytest.raises(ValueError, match="does not have the instructions"):
        CpuDecoder(made_of(INTEGER), instructions=next(n for n in MISSING if not instructions.runs_here(n)))
    only_mlps = made_of(INTEGER, layers_block_type=["mlp", "mlp"], intermediate_size=32)
    with pytest.raises(ValueError, match="without a Mamba2 block"):
        CpuDecoder(only_mlps)


def test_helpers_leave_and_come_back():
    made, ids = made_of(INTEGER), tokens(1, 6)
    one, two = CpuDecoder(made), CpuDecoder(made, 2)
    for token in ids[0].tolist():
        time.sleep(0.05)  # long enough for a helper to find nothing to do
        assert np.allclose(two.step(token), one.step(token), atol=1e-5)


def test_states_go_into_a_cache_and_out_of_it():
    made, ids = made_of(INTEGER, **MLPS), tokens(1, 9)
    decoder, other = CpuDecoder(made), CpuDecoder(made)
    whole = decoded(decoder, ids)
    with torch.no_grad():
        cache = made(ids[:, :5], use_cache=True).cache
    other.load(cache)
    for token, wanted in zip(ids[0, 5:].tolist(), whole[5:], strict=True):
        assert torch.allclose(torch.from_numpy(other.step(token)), wanted, atol=1e-4)
    other.save(cache)
    with torch.no_grad():
        after, wanted = made(ids[:, :1], cache=cache).logits[0, 0], decoder.step(int(ids[0, 0]))
    assert torch.allclose(after, torch.from_numpy(wanted.copy()), atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_bytes_fetched_by_hand(weights):
    made = made_of(INTEGER, weights)
    decoder = CpuDecoder(made, shares=(0.1, 0.9), keep=True)
    d, inner = made.config.hidden_size, 64
    padded, head, out = (128 + 2 * 2 * 8 + 4, 61, d)
    bits = {"int8": 8, "int4": 4}[weights]
    width = -(-padded // (64 * 8 // bits)) * 64  # bytes of a row
    decoder.step(3)
    fires = int(np.count_nonzero(decoder.spikes[:, :d]))
    fetched = decoder.fetched()
    scales = 0 if bits == 8 else 2 * (d // 32) * width * 2
    assert fetched.in_proj == fires * width + scales
    assert fetched.out_proj >= 2 * inner * out * bits // 8  # in tiles: all of it, and padding
    assert fetched.head >= d * head * bits // 8
    assert fetched.share == (fetched.in_proj + fetched.out_proj) / fetched.projections
    assert fetched.states == 2 * (4 * 16 * 8 + 4 * (64 + 2 * 2 * 8)) * 4
    assert decoder.firing()[0] == fires / (2 * d)


def test_bytes_of_mixed_forms_by_hand():
    made = made_of(INTEGER, "mixed")
    decoder = CpuDecoder(made, shares=(0.9, 0.9))  # all in tiles: everything is read
    decoder.step(3)
    whole, wide = 0, tile_outputs(instructions.INSTRUCTIONS[instructions.best()])
    for block in made.backbone.layers:
        for layer in (block.mixer.in_proj, block.mixer.out_proj):
            inputs, outputs = layer.in_features, -(-layer.out_features // wide) * wide
            four = inputs * outputs // 2 + inputs // 32 * outputs
            whole += inputs * outputs if layer.group_scale is None else four
    fetched = decoder.fetched()
    assert fetched.projections == fetched.in_proj + fetched.out_proj == whole
