"""Write on from a prompt, token by token, by event-driven integers on this processor."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import TextStreamer

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import check_threads, cores
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Natural, Positive, Seed, schema
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.event_driven import STATES, WEIGHTS, EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.tokenizer import chat_prompt, check_vocabulary, load_tokenizer
from spiking_mamba.spikes.joules import NoEnergyCounter, ProcessorJoules


@schema
class GenerateSettings:
    """Every field is a key of the YAML file.

    Attributes:
        prompt: what to write on from.
        chat: ask it as a question of a chat, in the tokenizer's template.
        model: folder or hub name of a checkpoint, spiking or dense, or the folder of an event-driven model.
        tokenizer: folder or hub name; null: the checkpoint's own.
        tokens: how many to write at most.
        temperature: of sampling; 0: always the likeliest token.
        top_k: sample from so many of the likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens that have this probability together.
        repetition_penalty: what a token that has occurred is made less likely by; 1: nothing.
        seed: of sampling.
        weights: event-driven, of so many bits; auto: int8, or what the folder of an event-driven model has;
            null: the model as it is, float32, by torch.
        states: dtype of the scan's states in event-driven decoding; auto: float32, or what that folder has.
        threads: null: as many as this process may use.
    """

    prompt: str
    model: Name
    tokenizer: Name | None = None
    tokens: Count = 100
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: Natural = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Positive = 1.0
    chat: bool = False
    seed: Seed = 0
    weights: Literal["auto", *WEIGHTS] | None = "auto"  # type: ignore[valid-type]
    states: Literal["auto", *STATES] = "auto"  # type: ignore[valid-type]
    threads: Count | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt must not be empty.")
        check_threads(self.threads)

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``generate()``."""
        own: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            own |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return own | {"repetition_penalty": self.repetition_penalty}


def encoded(settings: GenerateSettings, tokenizer: Any) -> Any:
    """The prompt's ids, as text or as a question of a chat.

    Raises:
        ValueError: the tokenizer has no template of chats.
    """
    if not settings.chat:
        return tokenizer(settings.prompt, return_tensors="pt")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer has no chat template.")
    return chat_prompt(tokenizer, settings.prompt)


class Clock(TextStreamer):
    """Prints the text as it comes, and knows when the first token came and the last."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids, or a token's, [1, T] or [1]."""
        self.times.append(time.perf_counter())
        super().put(value)


def prepare(settings: GenerateSettings) -> SpikingMambaForCausalLM:
    """The model, ready to decode.

    Raises:
        ValueError: weights or states are asked for that an event-driven model does not have.
    """
    model = load_model(settings.model)
    if isinstance(model, EventDrivenMambaForCausalLM):
        made = model
        for key, value in (("weights", settings.weights), ("states", settings.states)):
            if value not in ("auto", getattr(model.config, key)):
                raise ValueError(
                    f"{key}={'null' if value is None else value}: {settings.model} is an event-driven model "
                    f"already, of {key}={getattr(model.config, key)}."
                )
    elif settings.weights is None:
        return model
    else:
        weights = "int8" if settings.weights == "auto" else settings.weights
        states = "float32" if settings.states == "auto" else settings.states
        made = event_driven(model, weights, states)
    made.set_decoding("compiled", settings.threads or cores())
    return made


@contextlib.contextmanager
def counting_joules() -> Iterator[ProcessorJoules | None]:
    """The processor's energy over the block; None where nobody counts it."""
    try:
        meter = ProcessorJoules()
    except NoEnergyCounter:
        yield None
        return
    with meter:
        yield meter


def summary(model: SpikingMambaForCausalLM, clock: Clock, joules: ProcessorJoules | None) -> str:
    """One line about the tokens behind the first, which the prompt's forward pass gives."""
    tokens = len(clock.times) - 2  # the prompt comes first, in one piece
    parts = [f"{tokens + 1} tokens"]
    if tokens > 0:
        parts.append(f"{tokens / (clock.times[-1] - clock.times[1]):.0f} tokens/s")
    decoders = getattr(model, "decoders", None)
    fetched = None if decoders is None else decoders.fetched()
    if fetched is not None:
        kind = f"{model.config.weights} and int8" if model.config.int8_layers else model.config.weights
        parts.append(
            f"{100 * fetched.share:.0f}% of the projections' {kind} weights fetched, "
            f"{fetched.total / 1e6:.1f} MB a token"
        )
    if joules is not None:
        parts.append(f"{1e3 * joules.joules / (tokens + 1):.1f} mJ a token, the whole processor's")
    return ", ".join(parts)


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(GenerateSettings, "generate", description)
    quiet()
    threads = settings.threads or cores()
    torch.set_num_threads(threads)
    tokenizer = load_tokenizer(settings.model, settings.tokenizer)
    model = prepare(settings)
    check_vocabulary(tokenizer, model)
    prompt = encoded(settings, tokenizer)
    own = settings.sampling()
    if settings.weights is not None:
        print("Compiling for this processor ...", end="\r", file=sys.stderr, flush=True)
        model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, **own)
        print(" " * 32, end="\r", file=sys.stderr, flush=True)
    torch.manual_seed(settings.seed)
    clock = Clock(tokenizer)
    with counting_joules() as joules:
        model.generate(**prompt, max_new_tokens=settings.tokens, streamer=clock, **own)
    if len(clock.times) == 2 and not settings.chat and getattr(tokenizer, "chat_template", None):
        print("\nIt ended at once: a model of chats; chat=true asks it a question.", file=sys.stderr)
    print(f"\n[{summary(model, clock, joules)}, {threads} {'thread' if threads == 1 else 'threads'}]")


if __name__ == "__main__":
    main()
