"""Real command lines, one process or two, each with one thread so that results repeat to the bit."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, **environment)
