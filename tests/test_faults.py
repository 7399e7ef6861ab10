"""The short forms of `python tests/faults.py --kills 200` and `--disk 50`."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.slow  # starts processes


@pytest.mark.parametrize(("option", "faults_"), [("--kills", "kills"), ("--disk", "full disks")])
def test_faults_at_random_moments_cost_no_more_than_the_epoch_in_progress(option, faults_):
    """In a process of its own: it forks, which takes one that has no threads."""
    command = [sys.executable, Path(faults.__file__), option, "6"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"6 {faults_} in ")
    assert done.stdout.endswith("every run ended with the weights and figures of the uninterrupted one\n")
