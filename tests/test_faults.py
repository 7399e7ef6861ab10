"""The short form of `python tests/faults.py --kills 200`."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.slow  # kills processes


def test_kills_at_random_moments_cost_no_more_than_the_epoch_in_progress():
    """In a process of its own: it forks, which takes one that has no threads."""
    command = [sys.executable, Path(faults.__file__), "--kills", "6"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 kills in ")
    assert done.stdout.endswith("every run ended with the weights and figures of the uninterrupted one\n")
