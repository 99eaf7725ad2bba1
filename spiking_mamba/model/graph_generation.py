"""``generate()`` of a model whose single tokens are CUDA graphs: the device does not wait for the host."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, MaxLengthCriteria

__all__ = ["cannot_loop", "choose", "decode", "settings", "sorted_criteria"]


def settings(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """What these arguments of ``generate()`` ask for; what they leave open is as the model has it."""
    asked = copy.deepcopy(kwargs.get("generation_config") or GenerationConfig())
    asked.update(**model.generation_config.to_dict(), defaults_only=True)
    known = asked.to_dict()
    asked.update(**{key: value for key, value in kwargs.items() if key in known})
    return asked


def cannot_loop(model: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why these arguments of ``generate()`` need transformers' own loop; None where they do not."""
    asked = settings(model, kwargs)
    mode = str(asked.get_generation_mode(kwargs.get("assistant_model")).value)
    if len(args) > 1 or kwargs.get("inputs_embeds") is not None:
        return "Only token ids are decoded, and other arguments by name."
    if mode not in ("greedy_search", "sample"):
        return f"Only greedy decoding and sampling are compiled, not {mode}."
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if ids is not None and ids.device != model.device:
        return f"The prompt is on {ids.device}, where transformers draws, and the model on {model.device}."
    # what needs a tokenizer is not handed on to a loop that is passed
    others = asked.prefill_chunk_size, asked.return_dict_in_generate, asked.stop_strings, asked.token_healing
    without_cache = asked.use_cache is not None and not asked.use_cache
    if without_cache or any(others):
        return (
            "use_cache=False, prefill_chunk_size, return_dict_in_generate, stop_strings and token_healing "
            "are not compiled."
        )
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return (
            "Somebody watches the model by forward hooks, as count_spikes does, which compiled code has not."
        )
    return None


class _Host:
    """The last tokens as the host sees them, without waiting for what was launched behind them."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._event = torch.cuda.Event() if ids.is_cuda else None
        # on the CPU whatever torch.set_default_device says
        self._tokens = torch.empty(ids.shape[0], dtype=torch.long, device="cpu", pin_memory=ids.is_cuda)

    def note(self, tokens: torch.Tensor) -> None:
        # other devices than CUDA have no event here to wait for
        self._tokens.copy_(tokens, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tokens.device))  # of the current device otherwise

    def read(self) -> torch.Tensor:
        """Waits for the tokens, no longer."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens


def sorted_criteria(criteria: Any) -> tuple[int | None, set[int], list[Any]]:
    """The length at which a text ends, None without one; the tokens that end it; what else may."""
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    last = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
    others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    return min(lengths, default=None), {int(token) for tokens in last for token in tokens.flatten()}, others


class _Ends:
    """Which sequences have ended."""

    def __init__(self, ids: torch.Tensor, criteria: Any, padding: torch.Tensor | None) -> None:
        self._longest, self._last, self._others = sorted_criteria(criteria)
        self._running, self._device = [True] * ids.shape[0], ids.device
        self._padding = padding if any(hasattr(c, "eos_token_id") for c in criteria) else None
        self._mask: torch.Tensor | None = None  # of those that run, where some have ended

    @property
    def asks_tokens(self) -> bool:
        """Whether the host has to see every token."""
        return bool(self._last)

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens, those of sequences that have ended replaced."""
        if self._mask is None or self._padding is None:
            return tokens
        return torch.where(self._mask, tokens, self._padding.to(tokens))

    def by_text(self, text: torch.Tensor) -> bool:
        """Whether all have ended by their length, or by a caller's criteria, which see the text at once."""
        for criterion in self._others:
            self._end(torch.as_tensor(criterion(text, None)).expand(len(self._running)).tolist())
        return not any(self._running) or (self._longest is not None and text.shape[1] >= self._longest)

    def by_tokens(self, tokens: torch.Tensor) -> bool:
        """Whether all have ended, these being the last tokens."""
        if self._last:
            self._end([token in self._last for token in tokens.tolist()])
        return not any(self._running)

    def _end(self, ended: list[bool]) -> None:
        running = [runs and not ends for runs, ends in zip(self._running, ended, strict=True)]
        if running != self._running:
            self._running = running
            self._mask = torch.tensor(running, device="cpu").to(
                self._device, non_blocking=self._device.type == "cuda"
            )


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    ahead: bool = True,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The loop of ``generate()``, greedy or sampling, tokens as from transformers' own.

    What transformers calls ``custom_generate``, with its arguments. The next token is launched before the
    host has seen whether this one ends the text, so that the device works meanwhile; only where ``ahead`` is
    False has a cache that outlives the call seen what the text has, no more, also where a streamer raises.

    Returns:
        The tokens, ``[B, n]``, the prompts first.
    """
    padding = generation_config._pad_token_tensor
    host, ends = _Host(input_ids), _Ends(input_ids, stopping_criteria, padding)
    waits = ends.asks_tokens or streamer is not None
    # padding that is no token may still stand where all have ended at once, which the model is not to see
    if input_ids.shape[0] > 1 and padding is not None:
        ahead = ahead and 0 <= int(padding) < model.config.vocab_size
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    output = model(**inputs, return_dict=True)
    cache, logits = output.cache, output.logits
    del inputs, output  # perhaps of the whole prompt
    text = cast(torch.LongTensor, input_ids)

    def ended() -> bool:
        seen = host.read()
        if streamer is not None:
            streamer.put(seen.clone())
        return ends.by_tokens(seen)

    while True:
        tokens = ends.padded(
            choose(logits[:, -1].float(), text, logits_processor, generation_config.do_sample)
        )
        # anew, as transformers does, so that who reads it finds it contiguous and may keep it
        text = cast(torch.LongTensor, torch.cat([text, tokens[:, None]], 1))
        if waits:
            host.note(tokens)
        over = ends.by_text(text)
        if waits and not ahead:
            over = ended() or over
        if not over:
            logits = model(text[:, -1:], cache=cache, use_cache=True).logits
        if waits and ahead:
            over = ended() or over
        if over:
            break
    if streamer is not None:
        streamer.end()
    return text


def choose(
    scores: torch.Tensor, text: torch.LongTensor, processors: LogitsProcessorList, samples: bool
) -> torch.Tensor:
    """Tokens ``[B]`` of logits ``[B, vocab_size]``, as ``generate()`` of transformers does."""
    if processors:
        scores = processors(text, cast(torch.FloatTensor, scores))
    if not samples:
        return scores.argmax(-1)
    return torch.multinomial(nn.functional.softmax(scores, -1), 1).squeeze(1)
