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


@pytest.fixture(scope="module")
def convert():
    """The modules of recipes/convert by name."""
    from tests.helpers.converting import recipe_modules  # imports torch and transformers

    with recipe_modules() as modules:
        yield modules
