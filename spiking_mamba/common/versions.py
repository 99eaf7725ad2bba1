"""Which releases of transformers the model has been tested with."""

import warnings
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

__all__ = ["TESTED_TRANSFORMERS", "warn_if_untested"]

TESTED_TRANSFORMERS = ">=5.23,<5.25"  # as in pyproject.toml, whose edges `make test-edges` runs


def warn_if_untested() -> None:
    """Warn where the installed release is none of them: a cache that it names anew would be lost."""
    installed = version("transformers")
    if not SpecifierSet(TESTED_TRANSFORMERS).contains(installed, prereleases=True):
        warnings.warn(
            f"transformers {installed} is outside the range that spiking_mamba was tested with, "
            f"{TESTED_TRANSFORMERS}: results may be wrong.",
            stacklevel=3,
        )
