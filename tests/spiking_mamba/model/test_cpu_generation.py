"""``generate()`` through compiled code: what it gives must be what transformers' own loop gives."""

import copy
import gc
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import neurons.backend
from spiking_mamba.model import cache as caches
from spiking_mamba.model import event_driven as module
from spiking_mamba.model.event_driven import event_driven
from tests.helpers.tiny import INTEGER, tiny_model, tokens

pytest.importorskip("numba")

SHAPE = {"n_groups": 2, "num_heads": 4, "head_dim": 16, "threshold": 0.25}
LONG = {"max_new_tokens": 12, "min_new_tokens": 12}


def made_of(spec=INTEGER, weights="int8", **fields):
    return event_driven(tiny_model(neuron=spec, **SHAPE | fields), weights)


def both_ways(made, ids, **settings):
    """What torch's way gives, and compiled code's."""
    found = []
    for decoding in ("torch", "compiled"):
        made.set_decoding(decoding)
        torch.manual_seed(3)
        found.append(made.generate(ids, **settings))
    return found


class Kept(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    ],
)
def test_tokens_are_those_of_transformers_loop(weights, how):
    wanted, found = both_ways(made_of(weights=weights), tokens(1, 5), **LONG | how)
    assert found.shape == (1, 17)
    assert torch.equal(found, wanted)


def test_with_mlp_blocks():
    kinds = {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mlp", "mlp", "mamba"],
        "intermediate_size": 48,
    }
    wanted, found = both_ways(made_of(**kinds), tokens(1, 5), do_sample=False, **LONG)
    assert torch.equal(found, wanted)


def test_without_a_prompt():
    wanted, found = both_ways(made_of(bos_token_id=1), None, do_sample=False, **LONG)
    assert torch.equal(found, wanted)


def test_what_is_returned_has_no_room_behind_it():
    made = made_of()
    free = made.generate(tokens(1, 5), do_sample=False, **LONG)
    for found in both_ways(made, tokens(1, 5).int(), max_new_tokens=12, eos_token_id=int(free[0, 8])):
        assert found.dtype == torch.long
        assert found.untyped_storage().nbytes() == 8 * found.numel()


def test_a_streamer_gets_the_prompt_and_every_token():
    made, streamer = made_of(), Kept()
    found = made.generate(tokens(1, 5), streamer=streamer, do_sample=False, **LONG)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended
    assert made.decoders.fetched() is not None


@pytest.mark.parametrize("own", [False, True])
def test_it_ends_where_it_should(own):
    made = made_of()
    free = made.generate(tokens(1, 5), do_sample=False, **LONG)
    how = {"stopping_criteria": StoppingCriteriaList([AfterThree()])} if own else {}
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1 if own else int(free[0, 7])}
    wanted, found = both_ways(made, tokens(1, 5), **settings | how)
    assert torch.equal(found, wanted)
    assert found.shape[1] <= 8


@pytest.mark.parametrize("name", caches.CACHE_NAMES)
def test_goes_on_from_a_cache_and_leaves_its_states_there(name):
    made, ids = made_of(), tokens(1, 9)
    after = []
    for decoding in ("torch", "compiled"):
        made.set_decoding(decoding)
        with torch.no_grad():
            cache = made(ids[:, :6], use_cache=True).cache
        settings = {name: cache, "attention_mask": None}
        found = made.generate(ids[:, 6:], do_sample=False, **LONG | settings)
        after.append([found, *(states[key] for states, key in caches.tensors(cache))])
    for wanted, found in zip(*after, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_padding_before_the_prompt_is_no_prompt():
    made, ids = made_of(), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    # without a mask transformers takes every 0 for padding
    alone = made.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **LONG)
    assert torch.equal(made.generate(padded, attention_mask=mask, do_sample=False, **LONG)[:, 3:], alone)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"use_cache": False},
    ],
)
def test_what_is_not_compiled_goes_the_torch_way_or_is_refused(how):
    made = made_of()
    settings = {"do_sample": False} | LONG | how
    torch.manual_seed(1)
    wanted = made.generate(tokens(1, 5), **settings)
    made.set_decoding("torch")
    torch.manual_seed(1)
    found = made.generate(tokens(1, 5), **settings)
    sequences = [getattr(output, "sequences", output) for output in (wanted, found)]
    assert torch.equal(*sequences)
    made.set_decoding("compiled")
    with pytest.raises(ValueError, match="decoding='compiled': "):
        made.generate(tokens(1, 5), **settings)


def test_a_configuration_leaves_open_what_the_model_has():
    made = made_of()
    made.generation_config.do_sample, made.generation_config.num_return_sequences = True, 2
    made.set_decoding("compiled")
    config = GenerationConfig(max_new_tokens=3)
    with pytest.raises(ValueError, match="Only one sequence at a time"):
        made.generate(tokens(1, 5), generation_config=config)
    made.generation_config.num_return_sequences, made.generation_config.num_beams = 1, 2
    with pytest.raises(ValueError, match="not beam_sample"):
        made.generate(tokens(1, 5), generation_config=config)


def test_a_model_that_was_cast_goes_the_torch_way_or_is_refused():
    made = made_of().to(torch.bfloat16)
    assert made.generate(tokens(1, 5), do_sample=False, **LONG).shape[1] > 5
    made.set_decoding("compiled")
    with pytest.raises(ValueError, match="beside the integers is compiled, and the model was cast"):
        made.generate(tokens(1, 5), do_sample=False, **LONG)
    assert made.float().generate(tokens(1, 5), do_sample=False, **LONG).shape[1] > 5


def test_a_batch_is_as_its_rows():
    made = made_of()
    ids = tokens(3, 5)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | LONG
    whole = made.generate(ids, **settings)
    settings["attention_mask"] = torch.ones_like(ids[:1])
    for row, alone in zip(whole, ids, strict=True):
        assert torch.equal(made.generate(alone[None], **settings)[0], row)


def test_what_cannot_be_decoded():
    made = made_of(num_heads=8, head_dim=8)
    assert made.generate(tokens(1, 4), max_new_tokens=2).shape[0] == 1  # the torch way
    made.set_decoding("compiled")
    with pytest.raises(ValueError, match="multiple of 16"):
        made.generate(tokens(1, 4), max_new_tokens=2)
    with pytest.raises(ValueError, match="decoding must be one of"):
        made.set_decoding("fast")
    with pytest.raises(ValueError, match="at least 1"):
        made.set_decoding("auto", 0)


def test_without_numba(monkeypatch):
    made, ids = made_of(), tokens(1, 4)
    wanted = made.generate(ids, do_sample=False, **LONG)
    neurons.backend.check_numba.cache_clear()
    monkeypatch.setattr(neurons.backend.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(made.generate(ids, do_sample=False, **LONG), wanted)
    with pytest.raises(RuntimeError, match="numba, which is not installed"):
        made.set_decoding("compiled")
    monkeypatch.undo()
    neurons.backend.check_numba.cache_clear()
    module.check_numba()


def test_copies_and_new_weights():
    made, ids = made_of(), tokens(1, 4)
    wanted = made.generate(ids, do_sample=False, **LONG)
    for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(same.generate(ids, do_sample=False, **LONG), wanted)
    with torch.no_grad():
        made.backbone.layers[1].mixer.in_proj.scale.mul_(3.0)
    assert torch.equal(*both_ways(made, ids, do_sample=False, **LONG))


def test_the_layout_follows_the_share_of_spikes():
    often = made_of(threshold=0.001)  # nearly everything fires
    seldom = made_of(threshold=4.0)
    for made, shares in ((often, (0.9, 1.0)), (seldom, (0.0, 0.7))):
        made.generate(tokens(1, 40), do_sample=False, **LONG)
        fetched = made.decoders.fetched()
        assert shares[0] <= fetched.share <= shares[1]
        assert fetched.in_proj + fetched.out_proj == pytest.approx(fetched.share * fetched.projections)


def test_two_models_and_four_threads_at_once():
    models = [made_of(), made_of(weights="int4")]
    for made in models:
        made.set_decoding("compiled", 2)
    prompts = [tokens(1, 5, seed) for seed in range(4)]
    settings = {"do_sample": False, "max_new_tokens": 60, "min_new_tokens": 60}
    wanted = [[made.generate(ids, **settings) for ids in prompts] for made in models]
    wrong = []

    def work(i):
        for _ in range(5):
            for made, own in zip(models, wanted, strict=True):
                if not torch.equal(made.generate(prompts[i], **settings), own[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_memory_stays_where_it_is():
    made = made_of()
    made.generate(tokens(1, 5), do_sample=False, max_new_tokens=500, min_new_tokens=500)

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    found = made.generate(tokens(1, 5), do_sample=True, max_new_tokens=20_000, min_new_tokens=20_000)
    assert found.shape[1] == 20_005
    assert resident() - before < 2**22
