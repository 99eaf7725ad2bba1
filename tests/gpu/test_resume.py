"""A distillation on a GPU that is killed and goes on (marked gpu): real command lines, compiled, in bf16."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spiking_mamba.training.pretraining import PretrainingSettings, pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="compares runs on an NVIDIA GPU"),
]
ROOT = Path(__file__).parents[2]
STEPS = 8


def run(*command):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(3000)))
    model = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "chunk_size": 64}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    teacher, _ = pretrain(
        PretrainingSettings(
            str(folder / "teacher"), str(text), 64, 300, model=model, training=training, compile=False
        )
    )
    return [
        ROOT / "recipes/distill/distill.py", ROOT / "recipes/distill/tiny.yaml", f"teacher={teacher}",
        f"data={text}", "length=64", "sgc={mode: blend}", f"training.max_steps={STEPS}",
        "training.logging_steps=1", "training.save_steps=2", "training.warmup_steps=0",
        "training.gradient_checkpointing=true",  # a logged step runs uncompiled, and is computed again so
    ]  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on(processes, arguments, tmp_path):
    """Within 1e-3, since atomics add in any order; on the CPU the tests ask for every bit."""
    if torch.cuda.device_count() < processes:
        pytest.skip("needs two GPUs")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    killed = ROOT / "tests/helpers/killed.py"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(*launch, *arguments, f"output={whole}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(*launch, killed, "_save_rng_state", *arguments, f"output={broken}").returncode != 0
    done = run(*launch, *arguments, f"output={broken}", "resume=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("checkpoint-4 is incomplete") == 1
    losses = [
        {row["step"]: row["loss"] for row in json.loads((folder / "log.json").read_text()) if "loss" in row}
        for folder in (whole, broken)
    ]
    assert losses[0].keys() == set(range(1, STEPS + 1))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
