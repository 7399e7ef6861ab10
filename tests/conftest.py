import pytest
import torch
from hypothesis import settings

# Derandomised: a failure is the library's, never the draw's; no deadline: the machine may be shared.
settings.register_profile("gaal", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gaal")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
