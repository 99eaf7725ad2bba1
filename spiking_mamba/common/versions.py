"""Which releases of transformers the model has been tested with."""

import warnings
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

__all__ = ["TESTED_TRANSFORMERS", "untested", "warn_if_untested"]

TESTED_TRANSFORMERS = ">=5.23,<5.25"  # as in pyproject.toml, whose edges `make test-edges` runs


def untested() -> str | None:
    """What is to be said of the installed release; None where it is one of them."""
    installed = version("transformers")
    if SpecifierSet(TESTED_TRANSFORMERS).contains(installed, prereleases=True):
        return None
    return (
        f"transformers {installed} is outside the range that spiking_mamba was tested with, "
        f"{TESTED_TRANSFORMERS}: results may be wrong."
    )


def warn_if_untested() -> None:
    """Warn where it is none of them: 5.17, say, reads no caches and ends SmolLM2's texts by another token."""
    if said := untested():
        warnings.warn(said, stacklevel=3)
