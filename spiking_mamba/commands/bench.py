"""Time decoding of a checkpoint on this processor: by integers that follow spikes, and by what is dense."""

import copy
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.claims import whole_folder
from spiking_mamba.common.errors import DataError, RunError, fail_clearly
from spiking_mamba.common.files import refuse_file, unused
from spiking_mamba.common.machine import check_threads, cores
from spiking_mamba.common.progress import Share, Stage, quiet, say
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.records import to_json
from spiking_mamba.common.schema import Count, Name, schema
from spiking_mamba.common.words import Words
from spiking_mamba.evaluation.cpu_speed import LLAMA, Way, captured_way, event_way, llama_ways, measure
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.configuration import FOLDED, SpikingMambaConfig, own_fields
from spiking_mamba.model.converted import is_converted
from spiking_mamba.model.event_driven import STATES, WEIGHTS, EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.pretrained import OWN_IN_FLOAT32
from spiking_mamba.model.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer
from spiking_mamba.reports.decoding import draw_speeds, speed_table
from spiking_mamba.spikes.joules import NoEnergyCounter, ProcessorJoules

WAYS = (
    *(f"{kind} {form}" for kind in ("dense", "spiking") for form in ("float32", "bfloat16")),
    *(f"{kind} {form}" for kind in ("dense", "event-driven") for form in WEIGHTS),
    *(f"llama.cpp {form}" for form in LLAMA),
)
_NAMES = f"{', '.join(WAYS[:-1])} or {WAYS[-1]}"


@schema
class BenchSettings:
    """Every field is a key of the YAML file.

    Attributes:
        model: folder or hub name of a checkpoint, spiking or dense, or the folder of an event-driven model.
        ways: to decode. event-driven: integers, of which those are fetched that spikes ask for; dense int8
            and int4: by the same code with nothing skipped; spiking: the model as it is, by torch; dense
            float32 and bfloat16: its weights without neurons, by torch; llama.cpp: the same as GGUF, by
            llama-cpp-python. null: all that this model has and this machine runs.
        over: the way that others are compared with; null: the first.
        prompt: what event-driven decoding begins with, since its speed depends on what it writes.
        tokenizer: folder or hub name; null: the checkpoint's own, and without one drawn ids for a prompt.
        tokens: of a repeat.
        repeats: of every way, in turn; an interval needs six.
        states: dtype of the scan's states in integer decoding; auto: float32, or what the folder of an
            event-driven model has.
        threads: null: as many as this process may use.
        output: a new or empty folder for table, picture and numbers; null: the table is printed, no more.
    """

    model: Name
    ways: (
        Annotated[list[Literal[WAYS]], Field(min_length=1), Words(f"a list of {_NAMES}")] | None  # type: ignore[valid-type]
    ) = None
    over: Literal[WAYS] | None = None  # type: ignore[valid-type]
    prompt: str = "The city lies on"
    tokenizer: Name | None = None
    tokens: Annotated[int, Field(ge=2, lt=2**20)] = 48
    repeats: Count = 9
    states: Literal["auto", *STATES] = "auto"  # type: ignore[valid-type]
    threads: Count | None = None
    output: Name | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt must not be empty.")
        check_threads(self.threads)
        if self.ways is not None:
            if len(set(self.ways)) < len(self.ways):
                raise ValueError(f"ways must not have the same twice, got {self.ways}.")
            if self.over is not None and self.over not in self.ways:
                raise ValueError(f"over must be one of ways, got {self.over!r}.")


class Makers:
    """What makes the ways of a model, each where it is asked for.

    Args:
        model: of the checkpoint.
        settings: of the command.
        prompt: ids, [1, n], or None.
        folder: for GGUF files.
    """

    def __init__(
        self,
        model: SpikingMambaForCausalLM,
        settings: BenchSettings,
        prompt: torch.Tensor | None,
        folder: Path,
    ) -> None:
        self.model, self.prompt, self.folder = model, prompt, folder
        self.states, self.threads = settings.states, settings.threads or cores()
        self._dense: SpikingMambaForCausalLM | None = None

    @property
    def spiking(self) -> bool:
        """Whether it has neurons."""
        return self.model.config.neuron is not None

    @property
    def dense(self) -> SpikingMambaForCausalLM:
        """The model itself, or its weights without neurons."""
        if self._dense is None:
            self._dense = without_neurons(self.model) if self.spiking else self.model
        return self._dense

    def make(self, name: str) -> Way:
        """A way that has decoded a token.

        Raises:
            ValueError: this model has none such, or this machine does not run it.
        """
        kind, form = name.split()
        try:
            way = self._integers(kind, form) if form in WEIGHTS else self._floats(kind, form)
            way.decode(2)
        except (ImportError, RuntimeError) as error:
            raise ValueError(str(error)) from error
        return way

    def _integers(self, kind: str, form: str) -> Way:
        made = self.model
        if isinstance(made, EventDrivenMambaForCausalLM):
            if self.states not in ("auto", made.config.states):
                raise ValueError(f"the checkpoint's states are {made.config.states}.")
            if (kind == "event-driven") != self.spiking or form != made.config.weights:
                own = "event-driven" if self.spiking else "dense"
                raise ValueError(f"the checkpoint is {own} {made.config.weights}, and nothing else.")
        elif kind == "event-driven" and not self.spiking:
            raise ValueError("the checkpoint is dense.")
        else:
            states = "float32" if self.states == "auto" else self.states
            made = event_driven(made if kind == "event-driven" else self.dense, form, states)
        return event_way(made, self.threads, self.prompt)

    def _floats(self, kind: str, form: str) -> Way:
        if isinstance(self.model, EventDrivenMambaForCausalLM):
            raise ValueError("an event-driven checkpoint has integers alone.")
        if kind == "llama.cpp":
            missing = [each for each in ("llama_cpp", "gguf") if importlib.util.find_spec(each) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} cannot be imported.")
            return llama_ways(self.dense, self.folder, self.threads, {form: LLAMA[form]})[f"{kind} {form}"]
        if kind == "spiking" and not self.spiking:
            raise ValueError("the checkpoint is dense.")
        source = self.model if kind == "spiking" else self.dense
        return captured_way(copy.deepcopy(source).to(getattr(torch, form)))


def without_neurons(model: SpikingMambaForCausalLM) -> SpikingMambaForCausalLM:
    """A dense model of a spiking one's weights: V_th divides before a neuron and multiplies behind it."""
    fields = own_fields(model.config) | FOLDED | {"neuron": None, "membrane": "token", "shift_inputs": False}
    dense = SpikingMambaForCausalLM(SpikingMambaConfig(**fields))
    dense.load_state_dict({k: w for k, w in model.state_dict().items() if not k.endswith(OWN_IN_FLOAT32)})
    return dense.eval()


def prompt_of(settings: BenchSettings, model: SpikingMambaForCausalLM) -> torch.Tensor | None:
    """The prompt's ids, [1, n]; None where the checkpoint has no tokenizer and none is named."""
    folder, _ = locate(settings.model)
    if settings.tokenizer is None and not has_tokenizer(folder) and not is_converted(folder):
        return None
    tokenizer = load_tokenizer(folder, settings.tokenizer)
    check_vocabulary(tokenizer, model)
    return tokenizer(settings.prompt, return_tensors="pt")["input_ids"]


def ways_of(makers: Makers, names: list[str] | None, over: str | None, progress: Share) -> dict[str, Way]:
    """The ways of these names; or all that there are, and lines about those that are not.

    Raises:
        DataError: one that is named, or ``over``, is not to be had.
    """
    ways, left = dict[str, Way](), dict[str, list[str]]()
    wanted = names or list(WAYS)
    for done, name in enumerate(sorted(wanted, key=lambda name: name != over)):  # over first: all hang on it
        progress(done / len(wanted))
        try:
            ways[name] = makers.make(name)
        except ValueError as error:
            if names is not None or name == over:
                raise DataError(f"{name} cannot be timed here: {error}") from error
            left.setdefault(str(error), []).append(name)
    for reason, several in left.items():
        say(f"{', '.join(several)}: left out: {reason}")
    if not ways:
        raise DataError("There is nothing to compare: every way was left out.")
    return {name: ways[name] for name in wanted if name in ways}


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Time all ways; say what is left out, and why.

    Returns:
        What ``results.json`` holds.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: nothing, or not all that ``ways`` names, can be timed here.
    """
    threads = settings.threads or cores()
    torch.set_num_threads(threads)
    model = load_model(settings.model)
    prompt = prompt_of(settings, model)
    with tempfile.TemporaryDirectory() as scratch, Stage(2, "bench") as stage:
        with stage.part("compiling") as share:
            makers = Makers(model, settings, prompt, Path(scratch))
            ways = ways_of(makers, settings.ways, settings.over, share)
        over = settings.over or next(iter(ways))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        with stage.part("decoding") as share:
            rows = measure(ways, settings.repeats, settings.tokens, meter(), share)
    known = provenance(settings)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    title = f"{settings.model}, {size:.1f} million parameters; {threads} "
    title += f"{'thread' if threads == 1 else 'threads'} of {known['hardware']['cpu']}; "
    title += f"{settings.repeats} repeats of {settings.tokens} tokens in turn"
    return {"title": title, "over": over, "decoding": rows, "load_before": load, "provenance": known}


def meter() -> ProcessorJoules | None:
    """The processor's, where it has one."""
    try:
        return ProcessorJoules()
    except NoEnergyCounter as error:
        say(f"joules: left out: {error}")
        return None


def check_output(settings: BenchSettings) -> None:
    """Raise a RunError where results could not be written."""
    if settings.output is not None:
        refuse_file(Path(settings.output))
        if not unused(Path(settings.output)):
            raise RunError(f"{settings.output} holds files already: name another output.")


def write(folder: Path, results: dict[str, Any]) -> None:
    """Table, picture and numbers, in a folder that is there whole or not at all."""
    with whole_folder(folder) as draft:
        draft.mkdir()
        (draft / "results.json").write_text(to_json(results))
        (draft / "table.md").write_text(speed_table(results) + "\n")
        name = Path(results["provenance"]["settings"]["model"]).name
        draw_speeds(results["decoding"], name, draft / "speed.png")


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(BenchSettings, "bench", description)
    check_output(settings)
    quiet()
    results = bench(settings)
    print(f"\n{speed_table(results)}")
    if settings.output is not None:
        write(Path(settings.output), results)
        print(f"\nTable, picture and numbers: {settings.output}")


if __name__ == "__main__":
    main()
