"""One of the processes that ``distilling.py`` starts: it distils in every part of its plan in turn.

What a person runs as ``accelerate launch --config_file recipes/distill/fsdp2.yaml recipes/distill/distill.py
recipes/distill/mamba2-1.3b.yaml`` is run here with the same settings, the teacher's weights and the tokens
drawn at random, as often as there are parts, so that imports and kernels are paid for once.
"""

import contextlib
import gc
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from distilling_parts import LOGGED_EVERY, Part
from kernel_shares import kernel_shares, kernels_of
from torch import distributed
from transformers import TrainerCallback

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.records import put_record
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.training.distillation import DistillationSettings, distill

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/distill/mamba2-1.3b.yaml"
FSDP = ROOT / "recipes/distill/fsdp2.yaml"
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_heads": 4, "vocab_size": 512, "state_size": 16}
THRESHOLD = 0.6  # near what calibration gives random weights; it takes no part in a step
CUDA = torch.cuda.is_available()


class Measured(BaseException):
    """Ends a training when its last step is done: no student is exported."""


class Watch(TrainerCallback):
    """Times steps, keeps the log, and ends the run as its part says.

    Args:
        part: what is measured.
        record: what is written after every row of the log, see :func:`note`.
        records: the file of records.
    """

    def __init__(self, part: Part, record: dict[str, Any], records: Path) -> None:
        self.part, self.record, self.records = part, record, records
        self.begun = self.saving = time.perf_counter()
        self.marks: dict[int, Any] = {}
        self.profile: Any = None

    def mark(self, step: int) -> None:
        if CUDA:
            self.marks[step] = torch.cuda.Event(enable_timing=True)
            self.marks[step].record()
        else:
            self.marks[step] = time.perf_counter()

    def seconds(self) -> dict[int, float]:
        """Of each step that is over, on the GPU's clock where there is one."""
        if CUDA:
            torch.cuda.synchronize()
        pairs = [(n, self.marks[n - 1], self.marks[n]) for n in self.marks if n - 1 in self.marks]
        return {n: round(a.elapsed_time(b) / 1e3 if CUDA else b - a, 4) for n, a, b in pairs}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step = state.global_step + 1
        if not self.marks:
            self.record["start_seconds"] = round(time.perf_counter() - self.begun, 2)
            self.mark(state.global_step)
        elif len(self.marks) == 2 and CUDA:  # one step was done: what loading took is no part of the peak
            torch.cuda.reset_peak_memory_stats()
        if step == self.part.profiled_step and state.is_world_process_zero:
            self.begin_profile()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.part.kill_at:
            note(self.record | {"state": "killed", "step": self.part.kill_at}, self.records)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.profile is not None:
            self.end_profile()
        self.mark(state.global_step)
        if state.global_step == self.part.steps:
            control.should_save = False  # Trainer would, at the end of a run that writes checkpoints

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        kept = {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        self.record["log"].append({"step": state.global_step} | kept)
        self.note()

    def on_save(self, args, state, control, **kwargs) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.record["saved_seconds"] = round(time.perf_counter() - self.saving, 2)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.note()
        raise Measured

    def note(self) -> None:
        """Put down what is known so far; what all processes held is asked of all."""
        part, seconds = self.part, self.seconds()
        self.saving = time.perf_counter()  # a checkpoint follows the log
        self.record["seconds"] = seconds
        for name, steps in (("step_seconds", part.timed(False)), ("logged_step_seconds", part.timed(True))):
            if timed := [seconds[n] for n in steps if n in seconds]:
                self.record[name] = statistics.median(timed)
        if CUDA:
            held = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
            largest = torch.tensor(held, device="cuda")
            if distributed.is_initialized():
                distributed.all_reduce(largest, distributed.ReduceOp.MAX)
            allocated, reserved = (round(each / 2**30, 2) for each in largest.tolist())
            self.record |= {"peak_allocated_gib": allocated, "peak_reserved_gib": reserved}
        note(self.record, self.records)

    def begin_profile(self) -> None:
        activity = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU])
        self.profile.start()
        if CUDA:
            torch.cuda.synchronize()
        self.profiling = time.perf_counter()

    def end_profile(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.profiling
        self.profile.stop()
        self.record["profile"] = kernel_shares(kernels_of(self.profile.events()), seconds)
        self.profile = None


def note(record: dict[str, Any], records: Path) -> None:
    """Put a part's record into the file, in the place of the one before; the first process alone does."""
    if int(os.environ.get("RANK", 0)) == 0:
        put_record(records, record, ("part",))


def settings_of(part: Part, runs: Path, rehearse: bool) -> DistillationSettings:
    training = {
        "max_steps": part.steps,
        "logging_steps": LOGGED_EVERY,
        "save_strategy": "steps" if part.save_at else "no",
        "save_steps": part.save_at or part.steps,
        "per_device_train_batch_size": part.rows,
        "gradient_accumulation_steps": part.accumulated,
        "gradient_checkpointing": part.checkpointing,
        "disable_tqdm": True,
    }
    given = [f"training.{key}={json.dumps(value)}" for key, value in training.items()]
    given += [f"teacher=state-spaces/mamba2-{part.size}", f"threshold={THRESHOLD}"]
    given += [f"output={runs / (part.resumes or part.name).replace(' ', '-')}"]
    given += ["resume=true" if part.resumes else "overwrite=true"]
    given += ["length=64"] if rehearse else []
    return parse_settings(DistillationSettings, [str(RECIPE), *given])


def teacher_of(size: str, rehearse: bool) -> SpikingMambaForCausalLM:
    """The same random weights in every process and every launch, in float32."""
    config = published_config(f"state-spaces/mamba2-{size}")
    if rehearse:
        config = SpikingMambaConfig.from_dict(config.to_dict() | SMALL | {"head_dim": 64, "expand": 2})
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        return SpikingMambaForCausalLM(config).eval()


def shard(sharding: str) -> None:
    """What ``accelerate launch`` makes of fsdp2.yaml; of ddp.yaml it makes nothing."""
    named = yaml.safe_load(FSDP.read_text())["fsdp_config"]
    wanted = {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in named.items()}
    for key, value in wanted.items():
        if sharding == "fsdp2":
            os.environ[key] = value
        else:
            os.environ.pop(key, None)


def run_part(part: Part, teacher: SpikingMambaForCausalLM, plan: dict[str, Any]) -> None:
    records, rehearse = Path(plan["records"]), plan["rehearse"]
    shard(part.sharding)
    settings = settings_of(part, Path(plan["runs"]), rehearse)
    count = part.steps * part.rows * part.accumulated * part.gpus
    ids = torch.randint(
        teacher.config.vocab_size, (count, settings.length), generator=torch.Generator().manual_seed(0)
    )
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    record = {"part": part.name, "state": "begun", "at": time.time(), "settings": asdict(part)}
    record |= {"device": device_name(), "torch": torch.__version__, "log": []}
    record["tokens"] = settings.length * part.rows * part.accumulated * part.gpus  # of a step
    if CUDA:
        record["held_before_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    note(record, records)
    watch = Watch(part, record, records)
    with contextlib.suppress(Measured):
        distill(settings, teacher=teacher, rows=rows, callbacks=[watch])
    note(record | {"state": "done"}, records)


@fail_clearly()
def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    quiet()
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if plan["compile_ahead"]:
        from kernel_tuning import compile_ahead

        compile_ahead(plan["compile_ahead"])
    PartialState(cpu=not CUDA)
    teacher, shape = None, ("", 0)
    for part in [Part(**each) for each in plan["parts"]]:
        left = broadcast_object_list([plan["deadline"] - time.time()])[0]
        if left < part.least:
            note({"part": part.name, "state": "left out", "settings": asdict(part)}, Path(plan["records"]))
            continue
        if (part.size, part.rows) != shape:
            torch.compiler.reset()  # or a second shape would be compiled for shapes that change
        if teacher is None or part.size != shape[0]:
            teacher = None  # there may be no room for two
            teacher = teacher_of(part.size, plan["rehearse"])
        shape = part.size, part.rows
        run_part(part, teacher, plan)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
