"""Kills a training at random moments, again and again, or fills its disk.

`python tests/faults.py --kills 200` and `python tests/faults.py --disk 50`.

Every life of a run is a process of its own, killed with SIGKILL and resumed by the next one, until the training ends;
then another run begins. A run has lost nothing if its checkpoint holds all epochs but the one in progress, and if its
results are those of a run that nobody killed. Processes are forked from one that has imported everything, so that most
of a life is training.

The disk is a small tmpfs in a mount namespace of the command's own, which Linux must let the user make. From a random
moment of a life on, a ballast file leaves a random rest of the disk. The life must end with exit code 2 and a sentence,
or have written everything before. Then the ballast is removed, and the run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tabular_image import run as _pipeline  # noqa: F401 - imported once, so that a life is training
from tabular_image import train

EPOCHS = 8
_DISK = "24m"  # room for a few checkpoints
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


def fill_again_and_again(fills: int, disk: Path, log: Path, seed: int = 0) -> Outcome:
    """Runs, and fills the disk until so many runs have met a full one.

    Args:
        fills: How many.
        disk: A small file system, empty.
        log: A file elsewhere, for what a run says on standard error.
        seed: Of the moments, and of what is left free.

    Raises:
        AssertionError: a full disk cost a finished epoch, was told in another way than by a sentence, left a file
            half-written, or let a run end in another way than an undisturbed one.
    """
    torch.set_num_threads(1)  # a fork keeps no other thread
    moments = random.Random(seed)
    whole, outcome = disk / "whole", Outcome(0, 0, Counter())
    started = time.monotonic()
    _live(whole, log).join()
    lifetime = time.monotonic() - started
    expected, size = _result(whole), (whole / "last.ckpt").stat().st_size
    shutil.rmtree(whole)
    while outcome.kills < fills:
        run = disk / f"run{outcome.runs}"
        while not (run / "results.json").exists():
            (run / "metrics.csv").unlink(missing_ok=True)  # what it holds at the end this life has written
            life = _live(run, log)
            life.join(moments.uniform(0, lifetime) if outcome.kills < fills else None)
            if life.is_alive():
                ballast = _fill(disk, moments.randrange(moments.choice((1, 4096, size))))
                life.join()
                ballast.unlink()
            if life.exitcode == 0:
                continue
            said = log.read_text()
            assert life.exitcode == 2, said
            assert said.startswith("error: cannot write "), said
            assert said.count("\n") == 1, said
            assert "No space left on device); free some space and " in said, said
            assert not list(run.glob(".*")), f"{run} holds a part of a file"
            outcome.kills += 1
            outcome.lost[max(0, _finished_epochs(run) - _saved_epochs(run))] += 1
            assert max(outcome.lost) <= 1, f"a full disk has cost {max(outcome.lost)} epochs of {run}"
        assert _same(_result(run), expected), f"{run} ended in another way than an undisturbed run"
        shutil.rmtree(run)
        outcome.runs += 1
    return outcome


def _fill(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes of a disk, even while another process writes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while (room := shutil.disk_usage(disk).free - free) > 0:
            file.write(bytes(min(room, 2**16)))
    return ballast


def _on_a_small_disk(arguments: argparse.Namespace) -> None:
    """Starts this command again where a small tmpfs is mounted that no other process sees."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount = f'mount -t tmpfs -o size={_DISK} tmpfs {shlex.quote(str(disk))} && exec "$@"'
        again = [sys.executable, __file__, "--disk", str(arguments.disk), "--seed", str(arguments.seed)]
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *again, "--mounted", str(disk)]
        try:
            code = subprocess.run(command).returncode
        except FileNotFoundError:
            sys.exit("faults.py: --disk mounts a file system of its own, with unshare of util-linux; install that")
    if code:
        sys.exit(f"faults.py: a run failed, or {' '.join(command[:3])} may not mount a tmpfs here: see above")


def _live(run: Path, log: Path | None = None) -> multiprocessing.Process:
    life = multiprocessing.get_context("fork").Process(target=_train, args=(run, log))
    life.start()
    return life


def _train(run: Path, log: Path | None) -> None:
    words = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = train.main([*words, "--out", str(run), "--resume", "true"])
    if log:
        log.write_text(said.getvalue())
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
    del figures["seconds"], figures["command"]
    return torch.load(run / "last.ckpt", weights_only=True)["state_dict"], figures


def _same(first: tuple[dict, dict], second: tuple[dict, dict]) -> bool:
    weights, others = first[0], second[0]
    equal = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    return equal and first[1] == second[1]


def main() -> None:
    """Prints what the faults did; fails where they did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--disk", type=int, help="fill the disk so often, instead of killing")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--mounted", type=Path, help=argparse.SUPPRESS)  # the small disk
    arguments = parser.parse_args()
    if arguments.disk and not arguments.mounted:
        _on_a_small_disk(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        if arguments.disk:
            outcome = fill_again_and_again(arguments.disk, arguments.mounted, Path(folder) / "said", arguments.seed)
        else:
            outcome = kill_again_and_again(arguments.kills, Path(folder), arguments.seed)
    seconds, what = time.monotonic() - started, "full disks" if arguments.disk else "kills"
    print(f"{outcome.kills} {what} in {outcome.runs} runs of {EPOCHS} epochs, {seconds:.0f} s")
    print(f"{outcome.lost[1]} of them cost an epoch that had ended and had no checkpoint yet; none cost more")
    print("every run ended with the weights and figures of the uninterrupted one")


if __name__ == "__main__":
    main()
