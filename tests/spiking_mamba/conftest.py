import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers.kernel_packages import interpreter_environment
from tests.neurons.conftest import host, nvrtc  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models as small as these lose more to threads that wait for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_interpreter():
    """The environment variables of a process that runs Triton's kernels on the CPU."""
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep the last three, a gigabyte each
        yield interpreter_environment(Path(folder))
