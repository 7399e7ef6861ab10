import gc
import os

import torch

# Where there is no GPU, Triton interprets its kernels, which it decides as it is imported: below, by torch's compiler.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import pytest
import reference
from hypothesis import settings
from wrapped import build

# Derandomised: a failure is the library's, never the draw's; no deadline: the machine may be shared.
settings.register_profile("gaal", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gaal")
torch.set_num_threads(1)
gc.disable()  # while modules are imported, which are no garbage


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what the tests make, and not among the modules again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return reference.make_batches(1)[0]


@pytest.fixture
def trained():
    """A model and its optimizer after three cached rounds: inner state and live guides."""
    model, optimizer = build()
    reference.train(optimizer, model, reference.make_batches(3), recipe="cached")
    return model, optimizer
