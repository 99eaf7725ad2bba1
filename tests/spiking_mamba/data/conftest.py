import pytest

from spiking_mamba.data import hub


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    """The hub's name is known: what answers there is up to a test."""
    monkeypatch.setattr(hub, "unreachable", lambda: False)
