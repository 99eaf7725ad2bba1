"""What holds for every test."""

import os
import sys
from collections.abc import Iterator

import pytest


def _of_the_process() -> dict[str, object]:
    """What one test could leave to the next."""
    state: dict[str, object] = {"directory": os.getcwd()}
    if torch := sys.modules.get("torch"):
        state |= {
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
        }
    for name in ("torch._dynamo.config", "torch._inductor.config"):
        if (config := sys.modules.get(name)) and hasattr(config, "get_hash"):
            state[name] = config.get_hash()
    return state


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """Tests run in any order: none may change what others find."""
    before = _of_the_process()
    yield
    after = _of_the_process()
    assert {key: after[key] for key in before} == before
