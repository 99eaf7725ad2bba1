import signal

import pytest

from tests.helpers.pictures import Drawn


@pytest.fixture(autouse=True)
def interruptible_tests():
    """A recipe that was interrupted in this process leaves the next Ctrl-C to the system."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def drawn(monkeypatch):
    return Drawn(monkeypatch)
