"""Kill runs at chosen moments, go on with them, and count what was lost.

python tests/storm/kills.py            # as `make storm` does
python tests/storm/kills.py --short    # as the tests do

A moment is the one before an operation on the run's folder: a file that is opened for writing, a name that is
given or taken, a folder that is made or removed. What these operations are, and in which order, a run that is
not killed tells first; of each aim as many are drawn as are asked for. Others are moments in time, which also
fall into what libraries write without Python. Every run is a child of this process, which imports everything
once, and dies by SIGKILL.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
from transformers import TrainerCallback

from spiking_mamba.common.progress import quiet
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.evaluation import harness  # noqa: F401 - imported once, here
from spiking_mamba.evaluation.evaluator import evaluate
from spiking_mamba.evaluation.settings import EvaluationSettings
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.training.distillation import DistillationSettings, distill
from tests.helpers.tiny import INTEGER, tiny_config

STEPS = 5
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
Report = Callable[[str], None]


class Operation(NamedTuple):
    number: int
    aim: str


class Ended(NamedTuple):
    """How a child ended: its exit status (negative: the signal) and what it reported."""

    status: int
    lines: list[str]


def child(action: Callable[[Report], None], kill: Callable[[int], None] | None = None) -> Ended:
    """Run an action in a child; ``kill`` gets its process id at once and may take its life."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            action(lambda line: os.write(writing, f"{line}\n".encode()))
            status = 0
        except BaseException as error:
            os.write(
                writing, f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}\n".encode()
            )
        os._exit(status)
    os.close(writing)
    if kill is not None:
        kill(pid)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines)


def watch(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call ``act(number, aim)`` before every operation on the folder from now on, in this process."""
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = arguments[0]
        else:
            return
        within = isinstance(path, str | os.PathLike) and str(folder) in os.fspath(path)
        removed = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # within a tree, by name alone
        if within or removed:
            act(number, aim(event, "" if removed else os.fspath(path)))
            number += 1

    sys.addaudithook(hook)


def aim(event: str, path: str) -> str:
    """What an operation belongs to."""
    name = next((part for part in Path(path).parts if part.startswith("checkpoint-")), "")
    if event in ("os.remove", "os.rmdir") or (name and event == "os.rename" and Path(path).name == name):
        return "removing"
    if Path(path).name.startswith("settings.yaml"):
        return "settings"
    if name:
        return "checkpoint"
    return "results"


# --- what is killed ---


class Told(TrainerCallback):
    """Report steps that begin, and checkpoints that are saved."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.report(f"step {state.global_step}")


class Storm:
    """Runs in a folder of its own; ``counts`` says what became of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.faults: list[str] = []
        torch.set_num_threads(1)
        torch.manual_seed(0)
        text = [f"Document {n}: the quick brown fox jumps over {7 * n} lazy dogs." for n in range(60)]
        self.tokenizer = train_tokenizer(text, 300)
        config = tiny_config(vocab_size=300, eos_token_id=0, bos_token_id=0)
        self.teacher = SpikingMambaForCausalLM(config).eval()
        ids = torch.randint(300, (40, 16), generator=torch.Generator().manual_seed(0))
        self.rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
        self.text = folder / "text.txt"
        self.text.write_text("\n\n".join(text))
        self.dense = folder / "dense"
        self.teacher.save_pretrained(self.dense)
        self.tokenizer.save_pretrained(self.dense)

    def settings(self, output: Path, **fields: Any) -> DistillationSettings:
        training = {"max_steps": STEPS, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 2}
        training |= {"save_steps": 1, "save_total_limit": 1, "use_cpu": True}
        return DistillationSettings("", str(output), neuron=INTEGER, training=training, **fields)

    def train(self, settings: DistillationSettings) -> Callable[[Report], None]:
        def action(report: Report) -> None:
            quiet()
            distill(settings, self.teacher, self.tokenizer, self.rows, callbacks=[Told(report)])

        return action

    def evaluate(self, output: Path) -> Callable[[Report], None]:
        def action(report: Report) -> None:
            quiet()
            settings = EvaluationSettings(
                models=[str(self.dense)], output=str(output), tasks=[], corpora=[str(self.text)], length=16
            )
            evaluate(settings)

        return action

    # --- killing ---

    def operations(self, action: Callable[[Report], None], folder: Path) -> list[Operation]:
        """All operations of a run that is not killed."""

        def watched(report: Report) -> None:
            watch(folder, lambda number, what: report(f"operation {number} {what}"))
            action(report)

        ended = child(watched)
        assert ended.status == 0, ended.lines[-1:]
        words = [line.split() for line in ended.lines if line.startswith("operation")]
        return [Operation(int(number), what) for _, number, what in words]

    def killed_at(self, action: Callable[[Report], None], folder: Path, operation: int) -> Ended:
        def dying(report: Report) -> None:
            watch(
                folder,
                lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == operation else None,
            )
            action(report)

        return child(dying)

    def killed_after(self, action: Callable[[Report], None], seconds: float) -> Ended:
        def kill(pid: int) -> None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)

        return child(action, kill)

    def draw(self, operations: list[Operation], number: int) -> list[Operation]:
        """That many of each aim, or all of it, spread from the first to the last."""
        drawn = []
        for what in sorted({operation.aim for operation in operations}):
            own = [operation for operation in operations if operation.aim == what]
            wanted = min(number, len(own))
            drawn += [own[round(i * (len(own) - 1) / max(1, wanted - 1))] for i in range(wanted)]
        return drawn

    def judge(self, kind: str, killed: Ended, saved: int, again: Ended, right: bool, left: list[str]) -> None:
        """Note what became of a kill: what ``again``, the run that went on, has told."""
        if killed.status != -signal.SIGKILL:
            self.counts["ended before it was killed"] += 1
            return
        self.kills[kind] += 1
        started = [int(line.split()[1]) for line in again.lines if line.startswith("step")]
        lost = bool(started) and started[0] < saved
        for fault, found in (
            ("lost more than the last unsaved steps", lost),
            ("could not be gone on with", again.status != 0),
            ("went on to another result", again.status == 0 and not right),
            ("left something behind", again.status == 0 and bool(left)),
        ):
            if found:
                self.counts[fault] += 1
                said = [line for line in again.lines if line.startswith("error")]
                self.faults.append(f"{kind}: {fault} {said or left or ''}")

    # --- the storms ---

    def reference(self) -> tuple[bytes, list[dict[str, Any]]]:
        output = self.folder / "reference"
        assert child(self.train(self.settings(output))).status == 0
        return self.result(output)

    def result(self, output: Path) -> tuple[bytes, list[dict[str, Any]]]:
        try:
            log = json.loads((output / "log.json").read_text())
            rows = [{k: v for k, v in row.items() if k not in TIMES} for row in log]
            return (output / "model/model.safetensors").read_bytes(), rows
        except (OSError, ValueError):
            return b"", []

    def left(self, output: Path) -> list[str]:
        """Drafts, and checkpoints that are not whole."""
        drafts = [path.name for path in output.rglob("*.part")]
        return drafts + [p.name for p in output.glob("checkpoint-*") if not (p / "complete").exists()]

    def saved(self, killed: Ended) -> int:
        """The last checkpoint that was surely whole: of the step before the last one that began."""
        began = [int(line.split()[1]) for line in killed.lines if line.startswith("step")]
        return began[-1] if began else 0  # a step begins when the checkpoint of the one before is whole

    def training(self, aimed: int, timed: int) -> None:
        """Fresh runs, killed in their settings, checkpoints, rotations and results, and at any time."""
        expected = self.reference()
        start = time.monotonic()
        operations = self.operations(
            self.train(self.settings(self.folder / "traced")), self.folder / "traced"
        )
        seconds = time.monotonic() - start
        moments = [(f"training, {o.aim}", o.number) for o in self.draw(operations, aimed)]
        moments += [("training, any time", 0.9 * seconds * self.random.random()) for _ in range(timed)]
        for number, (kind, moment) in enumerate(moments):
            output = self.folder / f"training-{number}"
            action = self.train(self.settings(output))
            if isinstance(moment, int):
                killed = self.killed_at(action, output, moment)
            else:
                killed = self.killed_after(action, moment)
            again = child(self.train(self.settings(output, resume=True)))
            self.judge(
                kind, killed, self.saved(killed), again, self.result(output) == expected, self.left(output)
            )
            shutil.rmtree(output, ignore_errors=True)

    def finished(self, aimed: int) -> None:
        """A finished run that is resumed, killed, and resumed: it stays as it was."""
        expected = self.result(self.folder / "reference")
        again = self.settings(self.folder / "reference", resume=True)
        for operation in self.draw(self.operations(self.train(again), self.folder / "reference"), aimed):
            output = self.folder / "finished"
            shutil.copytree(self.folder / "reference", output)
            settings = self.settings(output, resume=True)
            killed = self.killed_at(self.train(settings), output, operation.number)
            ended = child(self.train(settings))
            right = self.result(output) == expected
            self.judge(f"finished, {operation.aim}", killed, STEPS, ended, right, self.left(output))
            shutil.rmtree(output)

    def overwriting(self, aimed: int) -> None:
        """A run that takes the place of another, killed, and begun again or gone on with."""
        expected = self.result(self.folder / "reference")
        before = self.folder / "before"
        assert child(self.train(self.settings(before, seed=1))).status == 0
        (before / "notes.txt").write_text("precious")
        output = self.folder / "overwriting"
        shutil.copytree(before, output)
        action = self.train(self.settings(output, overwrite=True))
        operations = self.operations(action, output)
        shutil.rmtree(output)
        for number, operation in enumerate(self.draw(operations, aimed)):
            shutil.copytree(before, output)
            killed = self.killed_at(action, output, operation.number)
            began = self.saved(killed)
            if number % 2 and "seed: 0" in (output / "settings.yaml").read_text():
                again = child(self.train(self.settings(output, resume=True)))
            else:
                again, began = child(action), 0
            right = self.result(output) == expected and (output / "notes.txt").read_text() == "precious"
            self.judge(f"overwriting, {operation.aim}", killed, began, again, right, self.left(output))
            shutil.rmtree(output)

    def evaluations(self, aimed: int) -> None:
        """An evaluation, killed and given again; what it measured is measured once."""

        def found(output: Path) -> Any:
            try:
                results = json.loads((output / "results.json").read_text())
            except (OSError, ValueError):
                return None
            return [results["models"], results["groups"], results["gaps"]]

        reference = self.folder / "evaluated"
        operations = self.operations(self.evaluate(reference), reference)
        for operation in self.draw(operations, aimed):
            output = self.folder / "evaluation"
            killed = self.killed_at(self.evaluate(output), output, operation.number)
            measured = {path.name: path.stat().st_mtime_ns for path in output.glob("cache/*.json")}
            again = child(self.evaluate(output))
            kept = all((output / "cache" / name).stat().st_mtime_ns == at for name, at in measured.items())
            right = kept and found(output) == found(reference)
            self.judge(f"evaluation, {operation.aim}", killed, 0, again, right, self.left(output))
            shutil.rmtree(output)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few kills of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments in time")
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        storm = Storm(Path(folder), given.seed)
        storm.training(*((2, 1) if given.short else (25, 15)))
        storm.finished(1 if given.short else 8)
        storm.overwriting(1 if given.short else 12)
        storm.evaluations(1 if given.short else 8)
    for kind, number in sorted(storm.kills.items()):
        print(f"{number:5d}  {kind}")
    print(f"{sum(storm.kills.values()):5d}  kills in {time.monotonic() - start:.0f} s, of which")
    faults = (
        "lost more than the last unsaved steps",
        "could not be gone on with",
        "went on to another result",
        "left something behind",
    )
    for fault in faults:
        print(f"{storm.counts[fault]:5d}  {fault}")
    print(f"{storm.counts['ended before it was killed']:5d}  runs ended before they were killed")
    for fault in storm.faults:
        print(fault, file=sys.stderr)
    return int(bool(storm.faults))


if __name__ == "__main__":
    sys.exit(main())
