"""How soon the pipeline begins: the time of the help, and of the first training batch of a large set.

Help and a mistyped option are measured in CPU seconds of a whole process, in turns with `import torch` alone. The large
set is a CSV file of small pictures, written for this measurement. Its seconds count from the moment after the table is
read. Its memory counts beyond the memory that the process held before. Pages of memory that the process shares with its
workers count for each of them.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse.typing import PositiveInt
from PIL import Image
from tabular_image.commands import run_command
from tabular_image.data import load
from tabular_image.data.identity import fingerprinted, identity
from tabular_image.data.module import TabularImageData

PIPELINE = Path(__file__).resolve().parents[2] / "examples" / "tabular_image"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "train.py --help": [str(PIPELINE / "train.py"), "--help"],
    "train.py --epohcs 3": [str(PIPELINE / "train.py"), "--epohcs", "3"],
    "prepare.py --help": [str(PIPELINE / "prepare.py"), "--help"],
}
_DISTINCT = 100  # number of different pictures; the other files are copies


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a Python process, in user and in system mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_set(folder: Path, rows: int, side: int) -> Path:
    """A CSV file with `rows` JPEG pictures, ten classes, two columns of numbers and one of categories."""
    random = np.random.default_rng(0)
    contents = []
    for _ in range(min(rows, _DISTINCT)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / "one.jpg")
        contents.append((folder / "one.jpg").read_bytes())
    for row in range(rows):
        (folder / f"{row}.jpg").write_bytes(contents[row % len(contents)])
    kinds = np.arange(rows) % 10
    table = pd.DataFrame(
        {
            "picture": [f"{row}.jpg" for row in range(rows)],
            "kind": [f"kind {kind}" for kind in kinds],
            "size": random.normal(kinds, 1.0),
            "weight": random.normal(size=rows),
            "colour": random.choice(["red", "green", "blue"], rows),
        }
    )
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def begin(path: Path, image_size: int, workers: int, batches: int) -> None:
    """Prints the seconds until the first batch, and the memory after some more batches."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = load("csv", path=path, image_column="picture", target_column="kind")
    start = time.perf_counter()
    samples = fingerprinted(samples, workers)
    identity(samples)
    known = time.perf_counter() - start
    data = TabularImageData(samples, image_size=image_size, workers=workers)
    loaded = iter(data.train_dataloader())
    next(loaded)
    seconds = time.perf_counter() - start
    for _ in zip(range(batches), loaded, strict=False):
        pass
    loaded.close()
    del loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    where = "from files" if data.workers else "in memory"
    print(f"{image_size:>4} px, {where:<10}{known:>8.1f} s identity{seconds:>8.1f} s{peak // 1024:>8} MiB more", end="")
    print(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024:>8} MiB a worker" if data.workers else "")


def main(
    rows: PositiveInt = 100_000,
    side: PositiveInt = 64,
    image_sizes: tuple[PositiveInt, ...] = (64, 48),
    workers: PositiveInt = 2,
    batches: PositiveInt = 300,
    repeats: PositiveInt = 5,
) -> None:
    """Measure the help and the large set.

    Args:
        rows: number of pictures in the large set.
        side: side of the picture files in pixels.
        image_sizes: values of `--image_size` of the pipeline. The size decides whether pixels are kept in memory.
        workers: number of processes that read pictures.
        batches: number of batches after the first before the memory is measured.
        repeats: runs of each command; the median is printed.
    """
    rounds = [{name: cpu_seconds(command) for name, command in COMMANDS.items()} for _ in range(repeats)]
    for name in COMMANDS:
        print(f"{name:<20}{statistics.median(seconds[name] for seconds in rounds):>6.2f} CPU s")
    with tempfile.TemporaryDirectory() as folder:
        path = write_set(Path(folder), rows, side)
        print(f"{rows} pictures")
        for image_size in image_sizes:
            process = multiprocessing.get_context("spawn").Process(
                target=begin, args=(path, image_size, workers, batches)
            )
            process.start()
            process.join()


if __name__ == "__main__":
    sys.exit(run_command(main, __file__, __doc__, example="--rows 1000"))
