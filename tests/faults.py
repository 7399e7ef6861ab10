"""Kills a training at random moments, again and again: `python tests/faults.py --kills 200`.

Every life of a run is a process of its own, killed with SIGKILL and resumed by the next one, until the training ends;
then another run begins. A run has lost nothing if its checkpoint holds all epochs but the one in progress, and if its
results are those of a run that nobody killed. Processes are forked from one that has imported everything, so that most
of a life is training.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tabular_image import train

EPOCHS = 8
# With every state that a resumed run must find again: momentum, guides of the last turns, schedule, augmentation.
OPTIONS = {
    **{"dataset": "digits", "epochs": EPOCHS, "optimizer": "sgd", "augment": "true", "fusion": "calibrated"},
    **{"gaal.guidance": "cached", "gaal.align": "update"},
    **{"accelerator": "cpu", "threads": 1, "pictures": "false"},
}


@dataclass
class Outcome:
    """What the kills did: how many there were, the runs they were spread over, and the epochs each cost."""

    kills: int
    runs: int
    lost: Counter[int]


def kill_again_and_again(kills: int, folder: Path, seed: int = 0) -> Outcome:
    """Runs and kills until so many kills have met a living process.

    Raises:
        AssertionError: a kill cost a finished epoch, or a killed run ended in another way than an uninterrupted one.
    """
    torch.set_num_threads(1)  # a fork keeps no other thread
    gc.freeze()  # nor does it look for garbage among the modules
    moments = random.Random(seed)
    whole, outcome = folder / "whole", Outcome(0, 0, Counter())
    started = time.monotonic()
    _live(whole).join()
    lifetime = time.monotonic() - started
    expected = _result(whole)
    while outcome.kills < kills:
        run = folder / f"run{outcome.runs}"
        while not (run / "results.json").exists():
            (run / "metrics.csv").unlink(missing_ok=True)  # what it holds at the end this life has written
            life = _live(run)
            life.join(moments.uniform(0, lifetime) if outcome.kills < kills else None)
            if life.is_alive():
                finished = _finished_epochs(run)
                life.kill()
                life.join()
                outcome.kills += 1
                outcome.lost[max(0, finished - _saved_epochs(run))] += 1
                assert max(outcome.lost) <= 1, f"a kill has cost {max(outcome.lost)} epochs of {run}"
            else:
                assert life.exitcode == 0, f"{run} did not resume"
        assert _same(_result(run), expected), f"{run} ended in another way than {whole}"
        outcome.runs += 1
    return outcome


def _live(run: Path) -> multiprocessing.Process:
    life = multiprocessing.get_context("fork").Process(target=_train, args=(run,))
    life.start()
    return life


def _train(run: Path) -> None:
    words = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = train.main([*words, "--out", str(run), "--resume", "true"])
    sys.exit(code)


def _finished_epochs(run: Path) -> int:
    """Epochs in the table, which is written when an epoch ends, just before the checkpoint."""
    table = run / "metrics.csv"
    return len(pd.read_csv(table)) if table.exists() else 0


def _saved_epochs(run: Path) -> int:
    checkpoint = run / "last.ckpt"
    return torch.load(checkpoint, weights_only=True)["epoch"] + 1 if checkpoint.exists() else 0


def _result(run: Path) -> tuple[dict, dict]:
    """All weights of the last epoch, and all figures but the time they took."""
    figures = json.loads((run / "results.json").read_text())
    del figures["seconds"]
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"], figures


def _same(first: tuple[dict, dict], second: tuple[dict, dict]) -> bool:
    weights, others = first[0], second[0]
    equal = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    return equal and first[1] == second[1]


def main() -> None:
    """Prints what the kills did; fails where they did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        outcome = kill_again_and_again(arguments.kills, Path(folder), arguments.seed)
    seconds = time.monotonic() - started
    print(f"{outcome.kills} kills in {outcome.runs} runs of {EPOCHS} epochs, {seconds:.0f} s")
    print(
        f"{outcome.lost[1]} of them fell between the end of an epoch and its checkpoint and cost that epoch; none more"
    )
    print("every run ended with the weights and figures of the uninterrupted one")


if __name__ == "__main__":
    main()
