import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models as small as these lose more to threads that wait for one another than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
