"""A token of an event-driven model as CUDA has it, here by its reference and by the kernels on the CPU."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional

import neurons
from spiking_mamba.model import cache as caches
from spiking_mamba.model import event_driven as module
from spiking_mamba.model.cuda import kernels, reference
from spiking_mamba.model.cuda.token import FusedToken, own_cache
from spiking_mamba.model.event_driven import event_driven
from tests.helpers.tiny import DEAD_ZONE, INTEGER, tiny_model, tokens

MLPS = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mlp", "mamba", "mlp", "mamba"],
    "intermediate_size": 72,
}
KINDS = {
    "plain": {},
    "groups, biases": {"n_groups": 2, "use_bias": True},
    "mlps": MLPS,
    "shifted": MLPS | {"shift_inputs": True},
    "no bias, limits": {"use_conv_bias": False, "time_step_limit": (0.02, 0.05), "conv_kernel": 3},
    "wide": {"vocab_size": 100, "hidden_size": 40, "num_heads": 5, "head_dim": 16, "state_size": 24},
}


def made_of(spec, weights="int8", states="float32", **fields):
    threshold = {"threshold": 1.0 if spec is None else 0.25}
    if spec is None:
        fields = fields | {"shift_inputs": False}
    model = tiny_model(neuron=spec, **threshold | fields)
    if weights == "mixed":  # 4 bits may cost so much that some layers stay int8
        return event_driven(model, "int4", states, calibration=tokens(4, 40), tolerance=0.0015)
    return event_driven(model, weights, states)


@torch.no_grad()
def decoded(made, ids, functions, states=torch.float32, prompt=4, keep=False):
    """Logits of the tokens behind a prompt, and the last token."""
    cache = own_cache(made(ids[:, :prompt], use_cache=True).cache, states)
    fused = FusedToken(made, functions, keep)
    return torch.cat([fused(token, cache) for token in ids[:, prompt:].split(1, 1)], 1), fused


@pytest.mark.parametrize("spec", [INTEGER, DEAD_ZONE, None])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_reference_is_the_model(spec, weights, fields):
    made, ids = made_of(spec, weights, **fields), tokens(3, 12)
    with torch.no_grad():
        wanted = made(ids).logits[:, 4:]
    found, _ = decoded(made, ids, reference)
    # of a dense model, a last bit moves an activation over the edge between two integers
    assert (found - wanted).norm() <= (0.02 if spec is None else 1e-5) * wanted.norm()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("spec", "weights", "states", "fields"),
    [
        (INTEGER, "int8", "float32", KINDS["groups, biases"]),
        (INTEGER, "int4", "bfloat16", MLPS),
        (INTEGER, "int8", "bfloat16", KINDS["shifted"]),
        (INTEGER, "mixed", "float32", {}),
        (DEAD_ZONE, "int8", "float32", KINDS["shifted"]),
        (None, "int8", "float32", {}),
    ],
    ids=["spiking", "4-bit with MLPs", "shifted", "mixed", "dead zone", "dense"],
)
def test_the_kernels_integers_equal_the_oracle(spec, weights, states, fields):
    made, ids = made_of(spec, weights, **fields), tokens(3, 7)
    dtype = getattr(torch, states)
    found, fused = decoded(made, ids, kernels, dtype, keep=True)
    wanted, right = decoded(made, ids, reference, dtype, keep=True)
    assert (found - wanted).norm() <= (0.02 if spec is None else 1e-4) * wanted.norm()
    layers = [getattr(b.mixer, n) for b in made.backbone.layers for n in ("in_proj", "out_proj")]
    assert len(fused.kept) == len(right.kept) == len(layers)
    for ours, layer in zip(fused.kept, layers, strict=True):
        if spec is None:
            continue
        assert ours.inputs.count_nonzero() > 0
        oracle = neurons.functional.event_driven_linear(ours.inputs, layer.integer_weight())
        assert torch.equal(ours.sums, oracle)
    if spec is not None:
        for ours, theirs in zip(fused.kept, right.kept, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)


@pytest.mark.parametrize("spec", [INTEGER, DEAD_ZONE])
def test_tokens_are_those_of_the_processor(spec):
    pytest.importorskip("numba")
    from spiking_mamba.model.cpu_decoder import CpuDecoder

    made, ids = made_of(spec), tokens(1, 10)
    found, fused = decoded(made, ids, reference, keep=True)
    decoder = CpuDecoder(made, keep=True)
    for token in ids[0].tolist():
        logits = torch.from_numpy(decoder.step(token).copy())
    assert torch.allclose(found[0, -1], logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    spikes = torch.from_numpy(decoder.spikes)
    for layer, (first, second) in enumerate(zip(fused.kept[::2], fused.kept[1::2], strict=True)):
        assert torch.equal(torch.cat([first.inputs, second.inputs], 1)[0], spikes[layer])


# ---- The model's own way there, with the kernels on the CPU ----


@pytest.fixture
def fused(monkeypatch, host):
    """Models on the CPU decode as those on CUDA do."""
    monkeypatch.setattr(module, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(module, "check_cupy", lambda: None)


@pytest.fixture
def counted(monkeypatch):
    calls = []
    call = FusedToken.__call__
    monkeypatch.setattr(FusedToken, "__call__", lambda self, *of: calls.append(1) or call(self, *of))
    return calls


@pytest.mark.usefixtures("fused")
def test_generate_and_streams_go_through_the_kernels(counted):
    made = made_of(INTEGER, states="bfloat16")
    plain = copy.deepcopy(made)
    plain.set_decoding("torch")
    asked = {"max_new_tokens": 5, "do_sample": False}
    for rows in (1, 2):
        ids = tokens(rows, 6)
        assert torch.equal(
            made.generate(ids, **asked),
            plain.generate(ids, **asked),
        )
    assert len(counted) == 2 * 4
    with torch.no_grad():
        ids, wanted = tokens(2, 6), plain(tokens(2, 6)).logits
        functional.set_step_mode(made, "s")
        streamed = torch.cat([made(token).logits for token in ids.split(1, 1)], 1)
        assert torch.allclose(streamed, wanted, atol=1e-4 * float(wanted.abs().max()))
        functional.reset_net(made)
    assert len(counted) == 2 * 4 + 5
    assert torch.equal(plain.generate(ids, **asked), made.generate(ids, **asked))  # the stream is another
    torch.manual_seed(0)
    made.generate(ids[:1], max_new_tokens=3, do_sample=True)


@pytest.mark.usefixtures("fused")
def test_what_has_no_kernel_goes_as_any_model(counted):
    made = made_of(INTEGER)
    asked = {"max_new_tokens": 3, "do_sample": False}
    made.generate(tokens(9, 4), **asked)
    assert not counted
    made.set_decoding("compiled")
    with pytest.raises(ValueError, match="At most 8 sequences"):
        made.generate(tokens(9, 4), **asked)
    with pytest.raises(ValueError, match="not 12"):
        made.generate(tokens(3, 4), num_beams=4, **asked)
    handle = made.backbone.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="watches"):
        made.generate(tokens(1, 4), **asked)
    handle.remove()
    made.set_decoding("auto")
    made.capture_decoding(False)
    made.generate(tokens(1, 4), **asked)
    assert not counted
    made.capture_decoding()
    found = made.generate(tokens(1, 4), num_beams=4, **asked)
    assert counted
    made.set_decoding("torch")
    assert torch.equal(found, made.generate(tokens(1, 4), num_beams=4, **asked))


@pytest.mark.usefixtures("fused")
def test_new_weights_are_seen():
    made, other = made_of(INTEGER), made_of(INTEGER, "int8", "float32", **{"threshold": 0.5})
    ids, asked = tokens(1, 4), {"max_new_tokens": 4, "do_sample": False}
    made.generate(ids, **asked)
    captured = made.graphs
    made.load_state_dict(other.state_dict())
    assert made.graphs is not captured  # on a GPU it holds copies of the weights before
    other.set_decoding("torch")
    assert torch.equal(made.generate(ids, **asked), other.generate(ids, **asked))


def test_refusals():
    with pytest.raises(ValueError, match="SiLU"):
        FusedToken(made_of(INTEGER, hidden_act="gelu"))
    with pytest.raises(ValueError, match="without a Mamba2 block"):
        FusedToken(made_of(INTEGER, layers_block_type=["mlp", "mlp"], intermediate_size=32))
    made = made_of(INTEGER)
    assert "on cpu" in made._cannot_fuse()
    cache = caches.new_cache(made.config)
    with pytest.raises(AssertionError, match="seen no token"):
        FusedToken(made, reference)(tokens(1, 1), cache)
