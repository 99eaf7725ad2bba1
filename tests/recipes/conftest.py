import signal

import pytest


@pytest.fixture(autouse=True)
def interruptible_tests():
    """A recipe that was interrupted in this process leaves the next Ctrl-C to the system."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
