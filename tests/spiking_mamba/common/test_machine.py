"""What this machine computes on."""

import pytest

from spiking_mamba.common import machine


@pytest.mark.parametrize("threads", [None, 1, 4])
def test_threads_that_there_are(monkeypatch, threads):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    machine.check_threads(threads)


@pytest.mark.parametrize("threads", [-1, 0, 5, 10**9])
def test_threads_that_there_are_not(monkeypatch, threads):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    with pytest.raises(ValueError, match=f"from 1 to 4, the cores that this process may use, got {threads}"):
        machine.check_threads(threads)
