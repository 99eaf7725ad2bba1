"""An event-driven model on a GPU: its kernels equal their reference, its tokens those of the processor."""

import copy
import importlib.util

import pytest
import torch
from spikingjelly.activation_based import functional

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.model.cuda import kernels, reference
from spiking_mamba.model.cuda.token import FusedToken, own_cache
from spiking_mamba.model.event_driven import event_driven
from tests.helpers.tiny import shake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy"),
]

INTEGER = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
SHAPE = {"vocab_size": 500, "hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 128}
MLPS = {"layers_block_type": ["mlp", "mamba", "mamba"], "intermediate_size": 328}


def made_of(spec=INTEGER, weights="int8", states="float32", **fields):
    torch.manual_seed(0)
    own = SHAPE | {"n_groups": 1, "num_hidden_layers": 3, "threshold": 1.0 if spec is None else 0.25}
    own |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    model = shake(SpikingMambaForCausalLM(SpikingMambaConfig(**own | fields, neuron=spec))).eval()
    return event_driven(model, weights, states)


# A last bit may tip a spike, or move an activation to another integer; what follows differs then.
CLOSE = 0.03


def ids_of(rows, length, seed=0):
    return torch.randint(500, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spec", "weights", "fields"),
    [
        (INTEGER, "int8", {}),
        (INTEGER, "int8", {"n_groups": 2, "use_bias": True}),
        (INTEGER, "int4", MLPS),
        (INTEGER, "int4", MLPS | {"shift_inputs": True}),
        (INTEGER, "int8", {"n_groups": 2, "shift_inputs": True}),
        (None, "int8", {}),
        (None, "int4", {"n_groups": 2}),
        (INTEGER, "int8", {"state_size": 16}),  # a lane has one state, or two
        (INTEGER, "int8", {"state_size": 70}),
    ],
    ids=str,
)
def test_kernels_equal_their_reference(spec, weights, fields):
    made = made_of(spec, weights, **fields).cuda()
    for rows in (1, 3, 8):
        ids = ids_of(rows, 10).cuda()
        with torch.no_grad():
            first = made(ids[:, :6], use_cache=True).cache
            kept, found = [], []
            for functions in (kernels, reference):
                fused, cache = FusedToken(made, functions, keep=True), own_cache(first, torch.float32)
                found.append(torch.cat([fused(token, cache) for token in ids[:, 6:].split(1, 1)], 1))
                kept.append(fused.kept)
        ours, right = found
        assert (ours - right).norm() <= CLOSE * right.norm()
        layers = [getattr(b.mixer, n) for b in made.backbone.layers for n in ("in_proj", "out_proj")]
        for own, other, layer in zip(*kept, layers, strict=True):
            assert own.inputs.count_nonzero() > 0
            assert (own.inputs != other.inputs).float().mean() <= 0.01
            if spec is not None:
                oracle = neurons.functional.event_driven_linear(own.inputs, layer.integer_weight())
                assert torch.equal(own.sums, oracle)


@torch.no_grad()
def token_by_token(model, ids):
    """Logits of all tokens, each behind those before."""
    cache, found = None, []
    for token in ids.split(1, 1):
        output = model(token, cache=cache, use_cache=True)
        cache = output.cache
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("states", "size"), [("float32", 128), ("bfloat16", 128), ("bfloat16", 16), ("bfloat16", 70)]
)
def test_captured_tokens_are_those_of_the_processor(states, size):
    made = made_of(states=states, state_size=size)
    on_gpu = copy.deepcopy(made).cuda()
    for rows in (1, 2, 5, 8, 12):  # the last are more than a launch takes
        ids = ids_of(rows, 14)
        with torch.no_grad():
            wanted = made(ids).logits
        for _ in range(2):
            found = token_by_token(on_gpu, ids.cuda()).cpu()
            # states in 16 bits tip more spikes
            bound = CLOSE if states == "float32" else 0.3
            assert (found - wanted).norm() <= bound * wanted.norm()
    assert sorted(on_gpu.graphs.captured) == [1, 2, 5, 8]


def test_generate_and_streams_are_captured():
    on_gpu = made_of().cuda()
    on_gpu.set_decoding("compiled")
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for rows in (1, 3):
        ids = ids_of(rows, 9).cuda()
        written = [on_gpu.generate(ids, attention_mask=torch.ones_like(ids), **asked) for _ in range(2)]
        assert torch.equal(*written)
        with torch.no_grad():
            output = on_gpu(ids, use_cache=True)
            by_hand = [output.logits[:, -1:].argmax(-1)]
            while len(by_hand) < 12:
                output = on_gpu(by_hand[-1], cache=output.cache, use_cache=True)
                by_hand.append(output.logits.argmax(-1))
        assert torch.equal(written[0][:, 9:], torch.cat(by_hand, 1))
    on_gpu.set_decoding("auto")
    ids = ids_of(2, 12).cuda()
    wanted = token_by_token(on_gpu, ids)
    functional.set_step_mode(on_gpu, "s")
    with torch.no_grad():
        for _ in range(2):
            streamed = torch.cat([on_gpu(token).logits for token in ids.split(1, 1)], 1)
            assert torch.equal(streamed, wanted)
            functional.reset_net(on_gpu)
    functional.set_step_mode(on_gpu, "m")
    torch.manual_seed(0)
    assert on_gpu.generate(ids, max_new_tokens=5, do_sample=True).shape[1] <= 17
    assert on_gpu.generate(ids, max_new_tokens=5, do_sample=False, num_beams=3).shape[1] <= 17


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_gives_what_transformers_loop_gives(monkeypatch, rows, how):
    on_gpu, ids = made_of().cuda(), ids_of(rows, 9).cuda()
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "pad_token_id": 0} | how
    found = []
    for _ in range(2):
        for loops in (True, False):
            with monkeypatch.context() as changed:
                if not loops:
                    changed.setattr("spiking_mamba.model.modeling.cannot_loop", lambda *_: "as asked")
                torch.manual_seed(5)
                found.append(on_gpu.generate(ids, **asked))
        assert torch.equal(*found[-2:])
        asked["eos_token_id"] = [int(found[0][0, 14]), int(found[0][-1, 20])]  # some end earlier


def test_a_token_comes_out_the_same_every_time():
    made, ids = made_of(None).cuda(), ids_of(4, 8).cuda()
    with torch.no_grad():
        first = made(ids[:, :7], use_cache=True).cache
        found = [
            FusedToken(made)(ids[:, 7:], own_cache(first, torch.float32)) for _ in range(20)
        ]  # floats, whose order of summation would show
    assert all(torch.equal(each, found[0]) for each in found)


def test_overlapping_launches_change_nothing():
    from neurons.cupy import launcher

    if (reason := launcher.cannot_overlap(torch.device("cuda", 0))) is not None:
        pytest.skip(reason)
    ids, found = ids_of(2, 20).cuda(), []
    for overlaps in (False, None):  # None: as they do by themselves
        with launcher.overlapping(overlaps):
            made = made_of().cuda()
            asked = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
            found.append(made.generate(ids, attention_mask=torch.ones_like(ids), **asked))
    assert torch.equal(*found)
