"""Energy that an NVIDIA GPU or a processor says it has used, with its idle power taken off.

The GPU by NVML's counter, the processor by the one that Linux shows.

A measurement of this machine and these kernels: it stands beside the analytic figures of
:mod:`spiking_mamba.spikes.energy` and is never mixed with them.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["JouleMeter", "NoEnergyCounter", "ProcessorJoules", "measure_joules"]


class NoEnergyCounter(RuntimeError):
    """Nothing here counts its energy for us; the message says what is missing."""


def _nvml() -> ModuleType:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise NoEnergyCounter("Joules are measured on NVIDIA GPUs, and torch sees none here.")
    try:
        import pynvml
    except ImportError:
        raise NoEnergyCounter(
            "Joules are read through NVML: install nvidia-ml-py (pip install nvidia-ml-py)."
        ) from None
    return pynvml


class JouleMeter:
    """The energy of one GPU over a ``with`` block, all that runs on it: nothing else should.

    Once made, the meter measures idle power; then it can be entered any number of times, and
    :meth:`result` is about all of its blocks together.

    Args:
        device: a CUDA device; ``None``: the current one. NVML finds it by its UUID, so that
            ``CUDA_VISIBLE_DEVICES`` cannot mix up GPUs.
        idle_seconds: how long to watch the idle GPU, with its context and memory as they are now. The
            counter moves a few times a second at least: shorter than a second says little.

    Raises:
        NoEnergyCounter: no NVIDIA GPU, no NVML, or a GPU without the counter (older than Volta, or MIG).
    """

    def __init__(self, device: torch.device | str | int | None = None, idle_seconds: float = 5.0) -> None:
        if idle_seconds <= 0:
            raise ValueError(f"idle_seconds must be positive, got {idle_seconds}.")
        self._pynvml = _nvml()
        self._device = (
            torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        )
        properties = torch.cuda.get_device_properties(self._device)
        self._name = properties.name
        try:
            self._pynvml.nvmlInit()
            self._handle = self._pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._pynvml.NVMLError as error:
            raise NoEnergyCounter(f"NVML does not count the energy of {self._name}: {error}") from error
        self._joules = self._seconds = 0.0
        joules, seconds = self._read()
        time.sleep(idle_seconds)
        later, end = self._read()
        self.idle_watts = (later - joules) / (end - seconds)

    def _read(self) -> tuple[float, float]:
        """Joules since the driver was loaded, and the time, once the GPU has done what it was given."""
        torch.cuda.synchronize(self._device)
        return self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3, time.perf_counter()

    def __enter__(self) -> "JouleMeter":
        self._start = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        joules, seconds = self._read()
        self._joules += joules - self._start[0]
        self._seconds += seconds - self._start[1]

    def result(self, tokens: int | None = None) -> dict[str, Any]:
        """What was measured so far.

        Returns:
            ``joules_total``, ``joules_idle`` (idle power times ``seconds``), ``joules_net`` (total less
            idle), ``seconds``, ``idle_watts``, ``gpu``, ``tokens``, ``joules_total_per_token`` and
            ``joules_net_per_token`` (``None`` without ``tokens``).
        """
        idle = self.idle_watts * self._seconds
        net = self._joules - idle
        return {
            "joules_total": self._joules,
            "joules_idle": idle,
            "joules_net": net,
            "seconds": self._seconds,
            "idle_watts": self.idle_watts,
            "gpu": self._name,
            "tokens": tokens,
            "joules_total_per_token": self._joules / tokens if tokens else None,
            "joules_net_per_token": net / tokens if tokens else None,
        }


class ProcessorJoules:
    """The energy of all processor packages over a ``with`` block, whatever runs on them, idle power included.

    It is RAPL's counter, of processors by Intel and AMD, as Linux shows it; as a rule only root may read it.

    Args:
        folder: where Linux shows it.

    Attributes:
        joules: of all blocks so far.

    Raises:
        NoEnergyCounter: there is none, or it may not be read.
    """

    def __init__(self, folder: str | Path = "/sys/class/powercap") -> None:
        # of a package, intel-rapl:0; its parts, intel-rapl:0:1, are in it, and it in the platform's, "psys"
        zones = [zone for zone in sorted(Path(folder).glob("intel-rapl:*")) if zone.name.count(":") == 1]
        try:
            packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            self._counters = [
                (zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in packages
            ]
        except OSError as error:
            raise NoEnergyCounter(f"{error.filename}: {error.strerror}") from error
        if not self._counters:
            raise NoEnergyCounter(f"{folder} shows no energy counter of a processor.")
        self.joules = 0.0
        self._read()

    def _read(self) -> list[int]:
        try:
            return [int(path.read_text()) for path, _ in self._counters]
        except OSError as error:
            raise NoEnergyCounter(f"{error.filename}: {error.strerror}") from error

    def __enter__(self) -> "ProcessorJoules":
        self._start = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        for before, after, (_, largest) in zip(self._start, self._read(), self._counters, strict=True):
            self.joules += ((after - before) % (largest + 1)) / 1e6  # it begins again at 0


def measure_joules(
    function: Callable[[], object],
    *,
    tokens_per_call: int | None = None,
    seconds: float = 10.0,
    min_calls: int = 3,
    idle_seconds: float = 5.0,
    device: torch.device | str | int | None = None,
) -> dict[str, Any]:
    """Call ``function`` again and again and measure the GPU's energy.

    It is called once before the clock starts (kernels are compiled and tuned then), and then for
    ``seconds`` and ``min_calls`` times at least.

    Args:
        function: what to measure, of ``tokens_per_call`` tokens.
        tokens_per_call: for joules a token; None: those of a call alone.
        seconds, min_calls: how long, and how often, at least.
        idle_seconds, device: see :class:`JouleMeter`.

    Returns:
        :meth:`JouleMeter.result`, and ``calls``.

    Raises:
        NoEnergyCounter: see :class:`JouleMeter`.
    """
    meter = JouleMeter(device, idle_seconds)
    function()
    calls, start = 0, time.perf_counter()
    with meter:
        while calls < min_calls or time.perf_counter() - start < seconds:
            function()
            torch.cuda.synchronize(meter._device)  # or the queue would outrun the clock
            calls += 1
    return meter.result(None if tokens_per_call is None else calls * tokens_per_call) | {"calls": calls}
