"""mamba-ssm's Triton kernels against transformers' torch functions, by Triton's interpreter on the CPU."""

import subprocess
import sys

import pytest
import torch

from tests.helpers.commands import HELPERS
from tests.helpers.triton_process import CASES, compute

# Of the largest value. Triton rounds more to bfloat16 than torch does, which widens the products first.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def by_triton(triton_interpreter, tmp_path_factory):
    results = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, str(HELPERS / "triton_process.py"), str(results)]
    done = subprocess.run(command, env=triton_interpreter, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(results)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_computes_what_torch_computes(case, by_triton):
    expected, actual = compute(case), by_triton[str(case)]
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        error, largest = (actual[name].float() - tensor.float()).abs().max(), tensor.float().abs().max()
        assert error <= TOLERANCE[case.dtype] * largest, f"{name}: off by {error} of {largest}"
