"""Measure the distillation of 1.3B and 2.7B on one and several GPUs, by the recipe, under a time limit.

python recipes/benchmark/distilling.py --gpus 4 --seconds 450 --out runs/distilling
python recipes/benchmark/distilling.py --gpus 2 --rehearse --out runs/distilling  # small, on any machine
python recipes/benchmark/distilling.py --report runs/distilling  # the tables of an earlier run

The settings are those of recipes/distill/mamba2-1.3b.yaml, but for the number of steps and V_th, which is
given instead of calibrated; weights and tokens are random. Parts are done in the order of what they tell,
and each is written to distilling.jsonl when it is done: one that fails, or takes too long, leaves the others
as they are. A run is killed by SIGKILL and resumed from its checkpoint, and its losses are compared with one
left alone. The rate of one GPU is measured while the others measure something else.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from distilling_parts import Launch, Part, plan
from distilling_tables import report

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.interruption import interruptible, measured_so_far
from spiking_mamba.common.machine import cores
from spiking_mamba.common.records import put_record, read_records

ROOT = Path(__file__).parents[2]
PROCESS = Path(__file__).with_name("distilling_process.py")
RECORDS, LOG = "distilling.jsonl", "log.txt"
PATIENCE = 15  # seconds for processes to end that have nothing left to do
FINAL = ("done", "killed", "failed", "took too long", "left out")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Running:
    """A launch that is under way, started anew without the part that failed."""

    def __init__(self, launch: Launch, args: argparse.Namespace, deadline: float, number: str) -> None:
        self.launch, self.args, self.deadline, self.number = launch, args, deadline, number
        self.records = args.out / RECORDS
        self.starts, self.compile_ahead = 0, max(1, cores() // args.gpus)
        self.over: float | None = None  # since when there is nothing left to do
        self.start()

    def start(self) -> None:
        """Start the processes for the parts that are not done."""
        self.starts += 1
        name = f"{self.number}-{self.starts}"
        about = {"parts": [asdict(part) for part in self.left()], "records": str(self.records)}
        about |= {"runs": str(self.args.runs), "deadline": self.deadline, "rehearse": self.args.rehearse}
        about["compile_ahead"] = self.compile_ahead if torch.cuda.is_available() else 0
        file = self.args.runs / f"plan-{name}.json"
        file.write_text(json.dumps(about))
        script = [*self.args.through, str(PROCESS), str(file)]
        processes = max(part.gpus for part in self.launch.parts)
        command = [sys.executable, *script]
        if processes > 1:
            elastic = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
            elastic += ["--rdzv-backend", "static", "--master-addr", "127.0.0.1"]
            command = [sys.executable, *elastic, "--master-port", str(free_port()), *script]
        with (self.args.out / LOG).open("a") as log:
            self.began = time.time()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=self.environment(), start_new_session=True
            )

    def environment(self) -> dict[str, str]:
        share = str(max(1, cores() // self.args.gpus))
        given = {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.launch.gpus)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": share,
            "TORCHINDUCTOR_COMPILE_THREADS": share,
            "TRITON_CACHE_AUTOTUNING": "1",  # what one process chose serves those after it
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # runs of several shapes in turn
            "PYTHONUNBUFFERED": "1",
            "SPIKING_MAMBA_TRACEBACK": "1",
        }
        return os.environ | given

    def states(self) -> dict[str, dict[str, Any]]:
        return {record["part"]: record for record in read_records(self.records)}

    def left(self) -> list[Part]:
        known = self.states()
        return [p for p in self.launch.parts if known.get(p.name, {}).get("state") not in FINAL]

    def give_up(self, part: Part, state: str) -> None:
        self.stop()
        known = self.states().get(part.name, {"part": part.name, "settings": asdict(part)})
        put_record(self.records, known | {"state": state}, ("part",))

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def goes_on(self) -> bool:
        """Look after the processes; whether there is anything left to wait for."""
        now, known, left = time.time(), self.states(), self.left()
        ended = self.process.poll() is not None
        if not left:
            self.over = self.over or now
            if ended or now > min(self.deadline, self.over + PATIENCE):
                self.stop()
                return False
            return True
        begun = known.get(left[0].name, {}).get("at", self.began)
        if now > self.deadline:
            for part in left:
                self.give_up(part, "took too long" if part.name in known else "left out")
            return False
        if not ended and now - begun < left[0].limit:
            return True
        self.give_up(left[0], "failed" if ended else "took too long")
        self.compile_ahead = 0  # whatever it was
        if not self.left():
            return False
        self.start()
        return True


def measure(args: argparse.Namespace) -> None:
    deadline = time.time() + args.seconds
    for number, stage in enumerate(plan(args.gpus, args.steps, args.short), 1):
        running: list[Running] = []
        try:
            for beside, launch in enumerate(stage, 1):
                launch.parts = [part for part in launch.parts if args.only is None or part.name in args.only]
                if launch.parts:
                    running.append(Running(launch, args, deadline, f"{number}-{beside}"))
            while running:
                time.sleep(0.5)
                running = [each for each in running if each.goes_on()]
        finally:
            for each in running:
                each.stop()


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, default=max(2, torch.cuda.device_count()), help="an even number")
    parser.add_argument("--seconds", type=float, default=3600, help="of all parts together")
    parser.add_argument("--steps", type=int, default=20, help="of the run that another is compared with")
    parser.add_argument("--short", type=int, default=12, help="steps of every other run")
    parser.add_argument("--out", type=Path, default=Path("runs/distilling"), help="new or empty folder")
    parser.add_argument("--runs", type=Path, help="folder for a checkpoint, 16 GB; by default in --out")
    parser.add_argument("--only", nargs="+", help="of the parts, those with these names")
    parser.add_argument("--rehearse", action="store_true", help="small models, short rows")
    parser.add_argument("--through", nargs="+", default=[], help="a script that runs the processes' own")
    parser.add_argument("--report", type=Path, help="measure nothing: print the tables of this folder")
    parser.add_argument("--speeds", type=Path, help="and put them into this file of records")
    args = parser.parse_args()
    if args.report is not None:
        print(report(read_records(args.report / RECORDS), args.speeds))
        return
    if args.gpus < 2 or args.gpus % 2:
        raise ValueError(f"--gpus must be an even number, got {args.gpus}.")
    if args.short < 10 or args.steps < 20:
        raise ValueError("--steps must be at least 20, and --short at least 10.")
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} already holds files.")
    names = [part.name for stage in plan(args.gpus, 20, 10) for launch in stage for part in launch.parts]
    if unknown := set(args.only or []) - set(names):
        raise ValueError(f"--only knows no {', '.join(sorted(unknown))}: {', '.join(names)}.")
    args.runs = args.runs or args.out / "runs"
    for folder in (args.out, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    with interruptible(lambda: measured_so_far(read_records(args.out / RECORDS), args.out, RECORDS)):
        measure(args)
    print(report(read_records(args.out / RECORDS), args.speeds))


if __name__ == "__main__":
    main()
