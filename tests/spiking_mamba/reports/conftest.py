import pytest

from tests.helpers.pictures import Drawn


@pytest.fixture
def drawn(monkeypatch):
    return Drawn(monkeypatch)
