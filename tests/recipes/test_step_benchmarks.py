"""The benchmarks of a training step and of counting spikes run on a processor, smaller than as documented."""

import pytest

from tests.helpers.commands import ROOT, run

SMALL = {"hidden_size": 32, "head_dim": 8, "state_size": 8, "layers": 1, "vocab_size": 64, "chunk_size": 16}
SMALL |= {"batch": 1, "length": 32, "repeats": 2}


@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("training_step", ["| transformers' Mamba2 ", "| dense ", "| spiking, SGC off "]),
        ("spike_counting", ["| not counted ", "| counted ", "| counted, with histograms "]),
    ],
)
def test_it_runs_on_a_processor(script, rows):
    options = [text for name, size in SMALL.items() for text in (f"--{name}", size)]
    done = run(ROOT / f"recipes/benchmark/{script}.py", *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert row in done.stdout, done.stdout
