"""Teach a Mamba2's mixers what a Transformer's attention does: first layer by layer, then by its logits.

python recipes/convert/train.py recipes/convert/layers.yaml
python -m torch.distributed.run --nproc-per-node 2 recipes/convert/train.py recipes/convert/logits.yaml
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from capture import captured
from conversion import convert
from flat import FlatParameters
from llama import Llama
from matching import LayerMatching, LogitMatching
from stage_settings import StageSettings
from tokens import Mixture, Stream, read_tokens

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import refuse_file
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.converted import load_mixers, mixers_of
from spiking_mamba.model.source import load_source

STARTED = time.monotonic()

STAGES = ("layers", "logits")
STATE, LOG = "state.pt", "log.jsonl"
_UNTIMED, _TIMED = 10, 30  # steps before the speed is taken, and over which it is


@schema
class TrainSettings(StageSettings):
    """Settings of a stage; every field is a key of the YAML file.

    Attributes:
        stage: 'layers': every mixer learns its attention layer's answers to the source's own inputs;
            'logits': all mixers together learn the source's logits.
        source: the Transformer, see ``source.load_source``.
        start: folder of packed mixers to start from, or null: from attention's own weights.
        expand: width of a mixer over the residual stream's.
        clip: norm that gradients are cut to, each mixer's in 'layers', all together in 'logits'.
    """

    stage: Literal[STAGES] = field(kw_only=True)
    source: Name = field(kw_only=True)
    start: Name | None = None
    expand: Count = 2


def learning_rate(settings: StageSettings, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` to ``final_learning_rate``."""
    share = min(1.0, step / max(1, steps))
    high, low = settings.learning_rate, settings.final_learning_rate
    return min(1.0, (step + 1) / max(1, settings.warmup)) * (
        low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))
    )


@dataclass
class Progress:
    """What of a stage is behind it: it is kept with the weights."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


class Stage:
    """A stage on one process."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if self.cuda else 0)
        if self.cuda:
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self.folder = Path(settings.output)
        self.progress = Progress(steps=settings.steps, settings=self._lasting())
        self._build()

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return self.settings.stage

    def _lasting(self) -> dict[str, Any]:
        passing = ("seconds", "log_every", "compiles", "graph", "piece", "budget", "output")
        return {key: value for key, value in asdict(self.settings).items() if key not in passing}

    def _build(self) -> None:
        settings = self.settings
        source = Llama.from_transformers(load_source(settings.source))
        self.student = convert(source, settings.expand, settings.seed).requires_grad_(False)
        if settings.start is not None:
            load_mixers(self.student, settings.start)
        self.vocabulary = self.student.config.vocab_size
        self.student.to(self.device).train()
        self.mixers = mixers_of(self.student)
        for mixer in self.mixers:
            mixer.requires_grad_(True)
        compiles = settings.compiles
        self.flat = FlatParameters(self.mixers, settings.bits, settings.group, compiles)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.source = replace(source.to(self.device, dtype), compiles=compiles)
        self.optimizer = torch.optim.AdamW(
            self.flat.groups(settings.weight_decay), betas=(0.9, 0.95), fused=self.cuda
        )
        self.batches = self._batches()
        if (self.folder / STATE).is_file():
            self._resume()
        if settings.stage == "layers":
            self.match: Any = LayerMatching(self.source, self.mixers, compiles)
        else:
            self.match = LogitMatching(self.source, self.student, compiles, settings.piece)

    def _batches(self) -> Mixture:
        settings = self.settings
        own = round(settings.rows * settings.own_share) if settings.own_text else 0
        if own == settings.rows or not settings.package_text:
            own = settings.rows
        parts = [(settings.own_text, own), (settings.package_text, settings.rows - own)]
        streams = [
            (
                Stream(read_tokens(paths, self.vocabulary), settings.length, settings.seed + k, self.device),
                count,
            )
            for k, (paths, count) in enumerate(parts)
            if count
        ]
        for stream, count in streams:
            self.say(f"{stream.count * stream.window:,} tokens, {count} of {settings.rows} rows")
        return Mixture(streams, self.rank, self.world)

    def say(self, text: str) -> None:
        """A line for whoever watches, with the seconds since the start."""
        if self.rank == 0:
            print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)

    def log(self, entry: dict[str, Any]) -> None:
        """A line of the log, from the first process."""
        if self.rank == 0:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _resume(self) -> None:
        state = torch.load(self.folder / STATE, map_location=self.device, weights_only=True)
        before = state["progress"]["settings"]
        changed = sorted(  # a key that is younger than the stage, and false, changes nothing
            key
            for key, value in self._lasting().items()
            if before.get(key) != value and (key in before or value is not False)
        )
        if changed:
            raise RunError(f"{self.folder} holds a stage with other settings of {', '.join(changed)}.")
        self.progress = Progress(**state["progress"])
        self.flat.restore(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.say(f"goes on at step {self.progress.step} of {self.progress.steps}")

    def save(self) -> None:
        """Keep all that the stage needs to go on as if nothing had happened."""
        if self.rank:
            return
        draft = self.folder / (STATE + ".part")
        state = {
            "progress": asdict(self.progress),
            "optimizer": self.optimizer.state_dict(),
        } | self.flat.state()
        torch.save(state, draft)
        draft.replace(self.folder / STATE)

    def run(self) -> None:
        """Train until the stage or this call's time is over."""
        settings, progress = self.settings, self.progress
        if progress.steps and progress.step >= progress.steps:
            self.say("the stage is complete")
            return
        step = self._prepared_step()
        self.say("compiled" if settings.compiles else "ready")
        begun, first = time.monotonic(), progress.step
        self.reported = begun, progress.tokens
        already = progress.seconds
        while not (progress.steps and progress.step >= progress.steps):
            ids = self.batches(progress.step)
            result = step(ids)
            norm = self._update(progress.step)
            progress.step += 1
            progress.tokens += ids.numel() * self.world
            progress.seconds = already + time.monotonic() - begun
            done = progress.step - first
            if not progress.steps:
                self._plan(done)
            if progress.step % settings.log_every == 0:
                self._report(result, norm)
                if self._over(begun, done):
                    break
        if progress.step % settings.log_every:
            self._report(result, norm)
        self.save()
        self.say(f"kept at step {progress.step} of {progress.steps}")

    def _prepared_step(self) -> Any:
        first = self.batches(self.progress.step)
        if self.cuda and self.settings.graph:
            step = captured(self.match, first)
        else:
            step = self.match
            step(first)  # compiles and tunes
        self.flat.clear_gradients()
        if self.world > 1:
            where = {"device_id": self.device} if self.cuda else {}
            torch.distributed.init_process_group("nccl" if self.cuda else "gloo", **where)
            for flat in self.flat.tensors():
                torch.distributed.broadcast(flat.data, 0)
            self.flat.round()
        return step

    def _update(self, number: int) -> torch.Tensor:
        """All-reduce, clip, step, round, clear."""
        self.flat.collect()
        if self.world > 1:
            for flat in self.flat.tensors():
                torch.distributed.all_reduce(flat.grad)
                flat.grad.div_(self.world)
        norm = self.flat.clip_gradients(self.settings.clip, each=self.kind == "layers")
        rate = learning_rate(self.settings, number, self.progress.steps or 10**9)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.flat.round()
        self.flat.clear_gradients()
        return norm

    def _agreed(self, value: float) -> float:
        """The first process's value: clocks differ, decisions must not."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def _plan(self, done: int) -> None:
        """Set the number of steps by the time that some took, the first ones left out."""
        if done not in (_UNTIMED, _UNTIMED + _TIMED):
            return
        if self.cuda:
            torch.cuda.synchronize()
        if done == _UNTIMED:
            self.timed_from = time.monotonic()
            return
        speed = _TIMED / (time.monotonic() - self.timed_from)
        steps = max(done, round(self.settings.budget * speed))
        self.progress.steps = int(self._agreed(steps))
        self.say(f"{self.progress.steps} steps fit into {self.settings.budget:.0f} s")

    def _over(self, begun: float, done: int) -> bool:
        """Whether this call's time is over, with a reserve to keep the state."""
        if not self.settings.seconds:
            return False
        reserve = 10.0 + self.settings.log_every * (time.monotonic() - begun) / max(1, done)
        left = self.settings.seconds - (time.monotonic() - STARTED) - reserve
        return self._agreed(left) < 0

    def losses(self, values: list[float]) -> dict[str, Any]:
        """What the log says of a step's result."""
        return {
            "loss": round(sum(values) / len(values), 5),
            "layers": [round(value, 4) for value in values] if len(values) > 1 else None,
        }

    def _report(self, result: torch.Tensor, norm: torch.Tensor) -> None:
        loss = result.float().clone()
        if self.world > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.world
        progress = self.progress
        losses = self.losses(loss.tolist())  # waits for the device
        now, (before, tokens) = time.monotonic(), self.reported
        self.reported = now, progress.tokens
        entry = {
            "stage": self.kind,
            "processes": self.world,
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **losses,
            "gradient_norm": round(float(norm), 4),
            "tokens_per_second": round((progress.tokens - tokens) / (now - before)),
        }
        if self.cuda:
            entry["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        if not math.isfinite(entry["loss"]):
            raise RunError(f"The loss of step {progress.step} is {entry['loss']}: the stage has diverged.")
        self.log(entry)
        shown = {key: value for key, value in entry.items() if key not in ("stage", "processes", "layers")}
        self.say(" ".join(f"{key} {value:,}" for key, value in shown.items()))


def run_stage(kind: type[Stage], settings: StageSettings) -> None:
    """Make a stage of that kind and run it, as a command does."""
    quiet()
    refuse_file(Path(settings.output))
    stage = kind(settings)
    stage.folder.mkdir(parents=True, exist_ok=True)
    try:
        stage.run()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@fail_clearly()
def main() -> None:
    run_stage(Stage, parse_settings(TrainSettings, description=__doc__))


if __name__ == "__main__":
    main()
