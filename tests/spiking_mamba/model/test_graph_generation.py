"""``generate()`` where single tokens are graphs: what it gives must be what transformers' own loop gives."""

import copy
import time

import pytest
import torch
from spikingjelly.activation_based import functional
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from spiking_mamba.model import cache as caches
from spiking_mamba.model import graph_generation as module
from spiking_mamba.spikes import count_spikes
from tests.helpers.tiny import INTEGER, tiny_model, tokens

HOW = {
    "greedy": {"do_sample": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "no repetition": {"do_sample": False, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
}


@pytest.fixture
def calls(monkeypatch):
    """How many calls of ``generate()`` went through our loop."""
    seen = []

    def decode(*args, **kwargs):
        seen.append(kwargs)
        return module.decode(*args, **kwargs)

    monkeypatch.setattr("spiking_mamba.model.modeling.decode", decode)
    return seen


def both(ids, seed=3, changed=lambda model: None, model=None, **settings):
    """What transformers' loop gives, and ours."""
    model = tiny_model(neuron=INTEGER, threshold=0.25) if model is None else model
    changed(model)
    found = []
    for captures in (False, True):
        model.capture_decoding(captures)
        torch.manual_seed(seed)
        each = {k: v() if k in ("streamer", "stopping_criteria") else v for k, v in settings.items()}
        found.append(model.generate(ids, **each))
        drawn = torch.rand(1)  # as many random numbers have been used
    torch.manual_seed(seed)
    model.capture_decoding(False)
    model.generate(
        ids, **{k: v() if k in ("streamer", "stopping_criteria") else v for k, v in settings.items()}
    )
    assert torch.equal(drawn, torch.rand(1))
    return found


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_transformers_loop(calls, how, batch):
    wanted, found = both(tokens(batch, 5), max_new_tokens=12, **how)
    assert found.shape == (batch, 17)
    assert torch.equal(found, wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_sequences_end_on_their_own_and_are_padded(calls, how):
    ids = tokens(4, 5)
    mask = torch.ones_like(ids)  # or zeros in a prompt were taken for padding
    free = both(ids, max_new_tokens=16, attention_mask=mask, **how)[0]
    last = [int(free[0, 7]), int(free[1, 10])]  # tokens that some come to, at different places
    wanted, found = both(
        ids, max_new_tokens=16, eos_token_id=last, pad_token_id=0, attention_mask=mask, **how
    )
    assert torch.equal(found, wanted)
    ends = [row.tolist() for row in found[:, 5:]]
    assert sum(row[-1] == 0 for row in ends) >= 1
    assert len(calls) == 2


def test_all_have_ended_before_the_length():
    ids = tokens(1, 5)
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    last = int(both(ids, **settings)[0][0, 9])
    wanted, found = both(ids, eos_token_id=last, pad_token_id=0, **settings)
    assert torch.equal(found, wanted)
    assert 6 <= found.shape[1] <= 10


@pytest.mark.parametrize("padding", [-1, 99])
def test_padding_that_is_no_token_is_not_shown_to_the_model_behind_the_last_token(calls, padding):
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    free, _ = both(ids, max_new_tokens=9, do_sample=False, attention_mask=mask)
    last = [int(free[0, 6]), int(free[1, 7])]  # one ends right behind the other
    settings = {"attention_mask": mask, "eos_token_id": last, "pad_token_id": padding}
    wanted, found = both(ids, max_new_tokens=9, do_sample=False, **settings)
    assert found.shape == (2, 8)
    assert found[0, -1] == padding
    assert torch.equal(found, wanted)
    assert len(calls) == 2


@pytest.mark.parametrize("returns", [1, 2])
def test_padding_and_several_texts_of_a_prompt(returns):
    ids = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    wanted, found = both(
        ids, attention_mask=mask, max_new_tokens=7, do_sample=True, num_return_sequences=returns
    )
    assert found.shape == (2 * returns, 13)
    assert torch.equal(found, wanted)


def test_a_long_text():
    wanted, found = both(tokens(1, 3), max_length=1100, do_sample=False, use_cache=True)
    assert found.shape == (1, 1100)
    assert torch.equal(found, wanted)


class Flat(LogitsProcessor):
    """Relies on tokens that lie in one piece, and changes all behind the prompt of five."""

    def __call__(self, input_ids, scores):
        seen = input_ids.view(-1)[-1:]
        input_ids[:, 5:].add_(1).remainder_(61)
        return scores.index_fill(1, seen, -torch.inf)


@pytest.mark.parametrize("batch", [1, 3])
def test_processors_get_tokens_in_one_piece_which_they_may_change(calls, batch):
    settings = {"max_new_tokens": 9, "do_sample": False, "logits_processor": LogitsProcessorList([Flat()])}
    wanted, found = both(tokens(batch, 5), **settings)
    assert torch.equal(found, wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_returned_lies_in_one_piece_without_room_behind_it(batch):
    ids = tokens(batch, 5)
    ends = {"stopping_criteria": lambda: StoppingCriteriaList([AtEight()]), "pad_token_id": 0}
    for found in both(ids.int(), max_new_tokens=12, do_sample=False, **ends):
        assert found.is_contiguous()
        assert found.dtype == torch.long
        assert found.untyped_storage().nbytes() == 8 * found.numel()


@pytest.mark.parametrize("eos", [False, True])
def test_whatever_the_default_device_is(calls, eos):
    ids = tokens(2, 5)
    free, _ = both(ids, max_new_tokens=9, do_sample=False)
    ends = {"eos_token_id": int(free[0, 7]), "attention_mask": torch.ones_like(ids)} if eos else {}
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    model.capture_decoding()
    with torch.device("meta"):
        found = model.generate(ids, streamer=Kept(), max_new_tokens=9, do_sample=False, **ends)
    assert torch.equal(torch.stack(Kept.made.tokens[1:], 1), found[:, 5:])
    assert torch.equal(found, free) != eos
    assert len(calls) == 2


def test_without_an_event_the_host_waits_for_its_copy(monkeypatch):
    seen, copy_ = [], torch.Tensor.copy_
    host = module._Host(torch.zeros(2, 1, dtype=torch.long))
    monkeypatch.setattr(
        torch.Tensor,
        "copy_",
        lambda to, source, non_blocking=False: (seen.append(non_blocking), copy_(to, source))[1],
    )
    host.note(torch.tensor([3, 4]))
    assert seen == [False]  # on MPS it would be read before it is there
    assert host.read().tolist() == [3, 4]


class Kept(BaseStreamer):
    made = None

    def __init__(self):
        self.tokens, self.ended, Kept.made = [], False, self

    def put(self, value):
        assert not self.ended
        self.tokens.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("eos", [False, True])
def test_a_streamer_gets_the_prompt_and_every_token(eos):
    ids = tokens(1, 5)
    free, _ = both(ids, max_new_tokens=9, do_sample=False)
    ends = {"eos_token_id": int(free[0, 8]), "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    model.capture_decoding()
    found = model.generate(ids, streamer=Kept(), max_new_tokens=9, do_sample=False, **ends if eos else {})
    assert torch.cat([each.flatten() for each in Kept.made.tokens]).tolist() == found[0].tolist()
    assert Kept.made.ended


class Breaks(Kept):
    """Raises at its fourth call."""

    def put(self, value):
        super().put(value)
        if len(self.tokens) == 4:
            raise KeyboardInterrupt


def test_a_cache_of_the_caller_when_the_streamer_raises():
    ids, after = tokens(2, 9), []
    for captures in (False, True):
        model = tiny_model(neuron=INTEGER, threshold=0.25)
        model.capture_decoding(captures)
        with torch.no_grad():
            cache = model(ids[:, :6], use_cache=True).cache
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                ids[:, 6:],
                cache=cache,
                attention_mask=None,
                streamer=Breaks(),
                max_new_tokens=8,
                do_sample=False,
            )
        after.append([*Kept.made.tokens, *(states[key].clone() for states, key in caches.tensors(cache))])
        after[-1].append(model.generate(ids, max_new_tokens=8, do_sample=False))  # goes on working
    for wanted, found in zip(*after, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


class AtEight(StoppingCriteria):
    """Ends the first sequence at 7 tokens, all at 9."""

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        done[0] = input_ids.shape[1] >= 7
        return done | (input_ids.shape[1] >= 9)


def test_criteria_of_the_caller():
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted, found = both(
        tokens(2, 5), stopping_criteria=lambda: StoppingCriteriaList([AtEight()]), **settings
    )
    assert found.shape == (2, 9)
    assert torch.equal(found, wanted)


class Replaces(StoppingCriteria):
    """Puts another token in the place of every fifth."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] % 5 == 0:
            input_ids[:, -1] = 7
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_what_criteria_put_into_the_text_goes_on():
    settings = {"max_new_tokens": 12, "do_sample": False}
    wanted, found = both(
        tokens(2, 3), stopping_criteria=lambda: StoppingCriteriaList([Replaces()]), **settings
    )
    assert torch.equal(found, wanted)


def test_time_ends_a_text():
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    model.capture_decoding()
    criteria = StoppingCriteriaList([MaxTimeCriteria(0.2)])
    start = time.monotonic()
    found = model.generate(tokens(1, 5), max_new_tokens=10**6, do_sample=False, stopping_criteria=criteria)
    assert 5 < found.shape[1] < 10**6
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", caches.CACHE_NAMES)
def test_a_cache_of_the_caller_has_seen_what_the_text_has(name, eos):
    ids, model = tokens(1, 9), tiny_model(neuron=INTEGER, threshold=0.25)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)
    ends = {"eos_token_id": int(free[0, 12]), "pad_token_id": 0} if eos else {}
    after = []
    for captures in (False, True):
        model.capture_decoding(captures)
        with torch.no_grad():
            cache = model(ids[:, :6], use_cache=True).cache
        settings = {name: cache, "attention_mask": None}
        found = model.generate(ids[:, 6:], do_sample=False, max_new_tokens=8, **ends | settings)
        after.append([found, *(states[key].clone() for states, key in caches.tensors(cache))])
    for wanted, found in zip(*after, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_a_stream_goes_on_behind_the_text():
    ids, after = tokens(1, 5), []
    for captures in (False, True):
        model = tiny_model(neuron=INTEGER, threshold=0.25)
        functional.set_step_mode(model, "s")
        model.capture_decoding(captures)
        free = model.generate(ids, max_new_tokens=6, do_sample=False)
        functional.reset_net(model)
        ends = {"eos_token_id": int(free[0, 8]), "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        found = model.generate(ids, max_new_tokens=6, do_sample=False, **ends)
        with torch.no_grad():
            after.append((found, model(ids[:, :1]).logits))
    assert torch.equal(after[0][0], after[1][0])
    assert torch.allclose(after[0][1], after[1][1], atol=1e-6)


def test_who_counts_spikes_sees_no_token_more(calls):
    ids, seen = tokens(1, 5), []
    for captures in (False, True):
        model = tiny_model(neuron=INTEGER, threshold=0.25)
        model.capture_decoding(captures)
        with count_spikes(model) as counts:
            model.generate(ids, max_new_tokens=6, do_sample=False)
        seen.append((counts.tokens, counts.mean_abs))
    assert seen[0] == seen[1]
    assert not calls


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"use_cache": 0},
        {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
    ],
    ids=["beams", "dict", "no cache", "none either", "a loop of one's own"],
)
def test_the_rest_goes_transformers_way(calls, how):
    wanted, found = both(tokens(2, 5), max_new_tokens=6, do_sample=False, **how)
    assert torch.equal(getattr(found, "sequences", found), getattr(wanted, "sequences", wanted))
    assert not calls


@pytest.fixture(scope="module")
def tokenizer():
    letters = Tokenizer(models.WordLevel({chr(65 + i): i for i in range(61)}, unk_token="A"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="A", pad_token="A")


def test_what_looks_for_strings_goes_transformers_way(calls, tokenizer):
    ids = tokens(1, 5)
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    free, _ = both(ids, **settings)
    calls.clear()
    letter = tokenizer.decode(free[0, 8])
    wanted, found = both(ids, stop_strings=letter, tokenizer=tokenizer, **settings)
    assert found.shape[1] <= 9
    assert torch.equal(found, wanted)
    wanted, found = both(ids, token_healing=True, tokenizer=tokenizer, **settings)
    assert torch.equal(found, wanted)
    assert not calls


def test_a_prompt_elsewhere_goes_transformers_way():
    """Its loop draws there, with the generator of that device."""
    model, ids = tiny_model(), tokens(1, 5)
    assert module.cannot_loop(model, (ids,), {}) is None
    for args, kwargs in (((ids.to("meta"),), {}), ((), {"input_ids": ids.to("meta")})):
        assert "The prompt is on meta" in module.cannot_loop(model, args, kwargs)


def test_who_asks_for_no_loop_of_ones_own_gets_this_one(calls):
    wanted, found = both(tokens(1, 5), max_new_tokens=6, do_sample=False, custom_generate=None)
    assert torch.equal(found, wanted)
    assert len(calls) == 1


def test_settings_in_a_configuration_are_seen(calls):
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    config = copy.deepcopy(model.generation_config)
    config.num_beams, config.max_new_tokens = 2, 5
    model.capture_decoding()
    model.generate(tokens(1, 5), generation_config=config, do_sample=False)
    assert not calls
    config.num_beams = 1
    model.generate(tokens(1, 5), generation_config=config, do_sample=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "own",
    [{"num_beams": 3}, {"use_cache": False}, {"return_dict_in_generate": True}],
    ids=["beams", "no cache", "dict"],
)
def test_a_configuration_leaves_open_what_the_model_has(calls, own):
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    model.generation_config.update(**own)
    config = GenerationConfig(max_new_tokens=6)
    wanted, found = both(tokens(2, 5), model=model, generation_config=config)
    assert type(found) is type(wanted)
    assert torch.equal(getattr(found, "sequences", found), getattr(wanted, "sequences", wanted))
    assert not calls


def test_a_model_that_samples_gives_several_texts_of_a_configuration_that_leaves_it_open(calls):
    model = tiny_model(neuron=INTEGER, threshold=0.25)
    model.generation_config.do_sample = True
    config = GenerationConfig(max_new_tokens=6)
    wanted, found = both(tokens(1, 5), model=model, generation_config=config, num_return_sequences=2)
    assert found.shape == (2, 11)
    assert torch.equal(found, wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("first", [False, True])
def test_inside_inference_mode_and_outside(calls, first):
    ids, model = tokens(2, 5), tiny_model(neuron=INTEGER, threshold=0.25)
    settings = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **settings)
    model.capture_decoding()
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            assert torch.equal(model.generate(ids, **settings), wanted)
    assert len(calls) == 3


def test_the_next_token_is_launched_before_this_one_is_read(monkeypatch):
    order, model = [], tiny_model(neuron=INTEGER, threshold=0.25)
    model.capture_decoding()
    step = model.graphs.step
    read = module._Host.read
    monkeypatch.setattr(module._Host, "read", lambda host: (order.append("read"), read(host))[1])
    model.graphs.step = lambda *args: (order.append("launch"), step(*args))[1]
    ids = tokens(1, 5)
    mask = torch.ones_like(ids)
    model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert order == ["launch", "read"] * 3 + ["read"]
    order.clear()
    model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)  # nobody asks for a token
    assert order == ["launch"] * 3
