"""Joules against a make-believe GPU that draws what it is told to."""

import builtins
import types

import pytest
import torch

from spiking_mamba.spikes import joules
from spiking_mamba.spikes.joules import JouleMeter, NoEnergyCounter, ProcessorJoules, measure_joules


class Card:
    """A GPU of 50 W, and 300 W while it works, on a clock of its own."""

    def __init__(self):
        self.now = self.energy = 0.0
        self.uuid_asked = None

    def spend(self, seconds, watts):
        self.now += seconds
        self.energy += seconds * watts

    def sleep(self, seconds):
        self.spend(seconds, 50.0)

    def work(self):
        self.spend(0.5, 300.0)


class NVMLError(Exception):
    pass


@pytest.fixture
def card(monkeypatch):
    card = Card()

    def handle(uuid):
        card.uuid_asked = uuid
        return "handle"

    def energy(handle):
        assert handle == "handle"
        return int(1e3 * card.energy)  # mJ

    pynvml = types.ModuleType("pynvml")
    pynvml.NVMLError, pynvml.nvmlInit = NVMLError, lambda: None
    pynvml.nvmlDeviceGetHandleByUUID = handle
    pynvml.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(__import__("sys").modules, "pynvml", pynvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    gpu = types.SimpleNamespace(name="Make-believe", uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(
        joules, "time", types.SimpleNamespace(sleep=card.sleep, perf_counter=lambda: card.now)
    )
    card.pynvml = pynvml
    return card


def test_idle_power_is_taken_off(card):
    result = measure_joules(card.work, tokens_per_call=100, seconds=10.0, idle_seconds=4.0)
    assert card.uuid_asked == "GPU-1234-abcd"
    assert (result["calls"], result["tokens"]) == (20, 2000)
    assert result == pytest.approx(
        {
            "joules_total": 3000.0,
            "joules_idle": 500.0,
            "joules_net": 2500.0,
            "seconds": 10.0,
            "idle_watts": 50.0,
            "gpu": "Make-believe",
            "tokens": 2000,
            "joules_total_per_token": 1.5,
            "joules_net_per_token": 1.25,
            "calls": 20,
        }
    )


def test_slow_calls_are_made_often_enough(card):
    result = measure_joules(lambda: card.spend(60.0, 100.0), seconds=1.0, min_calls=3)
    assert result["calls"] == 3
    assert result["joules_net"] == pytest.approx(3 * 60 * 50)
    assert result["tokens"] is result["joules_net_per_token"] is None


def test_blocks_add_up_and_what_is_between_does_not_count(card):
    meter = JouleMeter(device=0, idle_seconds=1.0)
    for _ in range(2):
        with meter:
            card.work()
        card.sleep(100.0)

    def fail():
        with meter:
            card.work()
            raise RuntimeError("fails")

    with pytest.raises(RuntimeError, match="fails"):
        fail()
    assert meter.result(tokens=3)["joules_total"] == pytest.approx(450.0)
    assert meter.result(tokens=3)["joules_net_per_token"] == pytest.approx(125.0)


def test_a_gpu_without_a_counter(card):
    def unsupported(handle):
        raise NVMLError("Not Supported")

    card.pynvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    with pytest.raises(NoEnergyCounter, match=r"Make-believe: Not Supported"):
        JouleMeter()


def test_without_nvml(card, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "pynvml")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(NoEnergyCounter, match="install nvidia-ml-py"):
        measure_joules(card.work)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoEnergyCounter, match="torch sees none"):
        measure_joules(lambda: None)


def test_no_time_to_idle(card):
    with pytest.raises(ValueError, match="idle_seconds"):
        JouleMeter(idle_seconds=0)


def _counter(folder, name, joules, largest=2**32, of="package-0"):
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{of}\n")
    (zone / "energy_uj").write_text(f"{round(1e6 * joules) % largest}\n")
    (zone / "max_energy_range_uj").write_text(f"{largest - 1}\n")


def test_a_processors_joules(tmp_path):
    _counter(tmp_path, "intel-rapl:0", 4290.0)
    _counter(tmp_path, "intel-rapl:1", 7.0)
    _counter(tmp_path, "intel-rapl:0:0", 1.0)  # a part of the first
    _counter(tmp_path, "intel-rapl:2", 1000.0, of="psys")  # the whole machine, the packages in it
    meter = ProcessorJoules(tmp_path)
    for before, after in ((4290.0, 4296.0), (4296.0, 4297.5)):
        _counter(tmp_path, "intel-rapl:0", before)
        with meter:
            _counter(tmp_path, "intel-rapl:0", after)  # past 2**32 microjoules: it begins again
            _counter(tmp_path, "intel-rapl:2", 1000.0 + after, of="psys")
    assert meter.joules == pytest.approx(7.5)


def test_no_counter_of_a_processor(tmp_path):
    with pytest.raises(NoEnergyCounter, match="no energy counter"):
        ProcessorJoules(tmp_path)
    _counter(tmp_path, "intel-rapl:0", 1.0)
    for name in ("energy_uj", "max_energy_range_uj", "name"):
        (tmp_path / "intel-rapl:0" / name).rename(tmp_path / "away")
        with pytest.raises(NoEnergyCounter, match=rf"intel-rapl:0/{name}: No such file"):
            ProcessorJoules(tmp_path)
        (tmp_path / "away").rename(tmp_path / "intel-rapl:0" / name)
