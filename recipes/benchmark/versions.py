"""What a measurement was of: the commit, the day, the machine, and the versions of what is timed."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spiking_mamba.common.machine import device_name
from spiking_mamba.common.provenance import commit_of, package_versions

TIMED = ("torch", "triton", "cupy-cuda13x", "spikingjelly", "transformers", "mamba-ssm", "causal-conv1d")


def about() -> dict[str, Any]:
    """Fields for a record; a package that is not installed has None."""
    return {
        "commit": commit_of(Path(__file__).parents[2]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(),
        "versions": {"python": platform.python_version()} | package_versions(TIMED),
    }


def line() -> str:
    """The same in a line."""
    fields = about()
    versions = ", ".join(f"{name} {found or '-'}" for name, found in fields["versions"].items())
    return f"{fields['device']}, {fields['date']}, commit {fields['commit']}; {versions}"
