"""Choosing the backend of a net's nodes, as spikingjelly's users know it."""

import functools
import importlib
import importlib.util

from torch import nn

__all__ = ["set_backend"]

BACKENDS = ("torch", "cupy")  # of the nodes
EVENT_BACKENDS = ("torch", "numba", "cupy")  # of the event-driven layers


def set_backend(
    net: nn.Module, backend: str, instance: type[nn.Module] | tuple[type[nn.Module], ...] | None = None
) -> None:
    """Set the backend of every node and event-driven layer of ``net`` that can have it; others keep theirs.

    Args:
        net: a module; its own backend is set too if it has one.
        backend: 'torch', 'cupy', or 'numba' (layers only). Whether it can run is checked when a module is
            called.
        instance: set it for modules of this class only; ``None`` means all that have backends.

    Raises:
        ValueError: ``backend`` is unknown; nothing has been changed then.
    """
    known = tuple(dict.fromkeys((*BACKENDS, *EVENT_BACKENDS)))
    if backend not in known:
        raise ValueError(f"backend must be one of {known}, got {backend!r}.")
    for module in net.modules():
        has = hasattr(module, "supported_backends") and (instance is None or isinstance(module, instance))
        if has and backend in getattr(module, "possible_backends", BACKENDS):
            setattr(module, "backend", backend)  # noqa: B010 (nn.Module's attributes are untyped)


@functools.cache  # an exception is not cached: installing CuPy later helps
def check_cupy() -> None:
    """Raise a RuntimeError that says what is missing where CuPy's backend cannot run."""
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError(
            "backend='cupy' needs CuPy, which is not installed: pip install cupy-cuda13x (CUDA 13) or "
            "cupy-cuda12x (CUDA 12)."
        )
    try:
        importlib.import_module("cupy")
    except Exception as error:
        raise RuntimeError(
            f"backend='cupy' needs CuPy, which is installed but does not import: {error}"
        ) from error


@functools.cache
def check_numba() -> None:
    """Raise a RuntimeError that says what is missing where numba's backend cannot run."""
    if importlib.util.find_spec("numba") is None:
        raise RuntimeError("backend='numba' needs numba, which is not installed: pip install numba.")
    try:
        importlib.import_module("numba")
    except Exception as error:
        raise RuntimeError(
            f"backend='numba' needs numba, which is installed but does not import: {error}"
        ) from error
