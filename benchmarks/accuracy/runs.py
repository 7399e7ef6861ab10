"""Runs of the pipeline, carried out in parallel and remembered: one line of a results file for each finished run."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tabular_image.data import Samples
from tabular_image.errors import InputError
from tabular_image.options import Options
from tqdm import tqdm

VERSION = 1  # of the lines and of what they mean; raise it when either changes
FUSIONS = ("mean", "product", "calibrated")
COLUMNS = (
    *("version", "set", "row", "seed", "fold"),
    *("val_accuracy", "best_epoch", "epochs", "seconds"),
    *("fused", "image", "table"),
    *(f"{split}_{fusion}" for split in ("val", "test") for fusion in FUSIONS),
    *("balanced_accuracy", "without_table", "train_rows", "test_rows"),
    *("conflict_image", "conflict_table"),
    "configuration",
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        set: what the benchmark calls the data set.
        row: what it calls the method with its settings.
        options: everything else; how the run is carried out in them is ignored.
    """

    set: str
    row: str
    options: Options

    @cached_property
    def key(self) -> str:
        """The full configuration as JSON: two runs with one key compute the same."""
        return json.dumps(self.options.configuration(), sort_keys=True)

    @property
    def folder(self) -> str:
        """A folder name for the run."""
        return f"{self.set}-{self.row}-{hashlib.sha256(self.key.encode()).hexdigest()[:12]}"


class Results:
    """A CSV file with one line a finished run, keyed by the run's full configuration.

    Args:
        path: the file; it is made with the first line.

    Raises:
        SystemExit: the file is of another version, or none of ours.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._rows: dict[str, dict[str, Any]] = {}
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):  # a line that was being written when the machine went down
            os.truncate(self.path, content.rfind(b"\n") + 1)
            if b"\n" not in content:
                return
        try:
            frame = pd.read_csv(self.path)
        except (ValueError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: {self.path} is no results file ({error}); give another --results") from error
        versions = set(frame.get("version", [None] * len(frame)))
        if tuple(frame) != COLUMNS or not versions <= {VERSION}:
            found = ", ".join(map(str, versions - {None})) or "unknown"
            raise SystemExit(
                f"error: {self.path} holds results of version {found}, and this benchmark writes version {VERSION}; "
                "keep the file with the release that wrote it, and give another --results"
            )
        self._rows = {row["configuration"]: row for row in frame.to_dict("records")}

    def __contains__(self, run: Run) -> bool:
        return run.key in self._rows

    def __getitem__(self, run: Run) -> dict[str, Any]:
        """The line of a finished run, under the names that this benchmark gives its set and row."""
        return self._rows[run.key] | {"set": run.set, "row": run.row}

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Append the line of a run that has just finished."""
        line = {"version": VERSION, "set": run.set, "row": run.row, **figures, "configuration": run.key}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = not self.path.exists() or self.path.stat().st_size == 0
        text = pd.DataFrame([line], columns=list(COLUMNS)).to_csv(index=False, header=first, lineterminator="\n")
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._rows[run.key] = line

    def table(self, runs: Sequence[Run]) -> pd.DataFrame:
        """The lines of those of the runs that are finished."""
        return pd.DataFrame([self[run] for run in runs if run in self], columns=list(COLUMNS))


@dataclass(frozen=True)
class Machine:
    """How runs are carried out; nothing here changes a result.

    Attributes:
        data_root: folder with one folder a data set.
        folder: where the run folders go; an interrupted run continues from its folder.
        jobs: runs at a time, one thread each.
        gpus: spread the runs over so many GPUs; 0 trains on the CPU.
        progress: show a bar.
    """

    data_root: str = "data"
    folder: str = "runs/accuracy"
    jobs: PositiveInt = 2
    gpus: NonNegativeInt = 0
    progress: bool = True


def complete(runs: Sequence[Run], results: Results, machine: Machine, needs: str = "") -> None:
    """Carry out what is not finished yet, in parallel.

    Every finished run is in the results file before the next begins in its place; a run that fails does not stop the
    others.

    Args:
        runs: of which the finished ones are left alone.
        results: gets a line for every run that finishes.
        machine: how they are carried out.
        needs: a file of the run folder that must be there too, such as `metrics.csv`.

    Raises:
        SystemExit: a run failed or a process was killed; the message says which, and where its log is.
    """

    def finished(run: Run) -> bool:
        return run in results and (not needs or (folder_of(run, machine) / needs).exists())

    missing = list({run.key: run for run in runs if not finished(run)}.values())
    failed: list[Run] = []
    context = _context(machine)
    slots = context.Queue()
    for slot in range(machine.jobs):
        slots.put(slot)
    with (
        ProcessPoolExecutor(machine.jobs, context, _start_worker, (slots, machine.gpus)) as pool,
        tqdm(total=len(missing), unit="run", disable=not machine.progress or not missing) as bar,
    ):
        started = {pool.submit(_carry_out, run, machine): run for run in missing}
        try:
            for future in as_completed(started):
                run = started[future]
                figures = future.result()
                if figures is None:
                    failed.append(run)
                elif run not in results:
                    results.add(run, figures)
                bar.set_postfix_str(f"{run.set} {run.row}", refresh=False)
                bar.update()
        except BrokenProcessPool as error:
            raise SystemExit(
                "error: a process that was training was killed, perhaps for want of memory; finished runs are in "
                f"{results.path}: lower --machine.jobs and start again to go on from there"
            ) from error
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True, wait=False)
            raise SystemExit(f"interrupted; finished runs are in {results.path}, start again to go on") from None
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise SystemExit(
            f"error: {failed[0].set} {failed[0].row} (seed {failed[0].options.seed}){more} of {len(missing)} runs "
            f"failed, see {log_of(failed[0], machine)}; the others are in {results.path}"
        )


def folder_of(run: Run, machine: Machine) -> Path:
    """The folder of a run."""
    return Path(machine.folder) / run.folder


def log_of(run: Run, machine: Machine) -> Path:
    """The file that holds what a run printed."""
    return folder_of(run, machine).with_suffix(".log")


def histories(runs: Sequence[Run], machine: Machine, name: str) -> pd.DataFrame:
    """A CSV file of every run's folder in one table, after the columns `set`, `row`, `seed` and `fold`."""
    tables = []
    for run in runs:
        keys = {"set": run.set, "row": run.row, "seed": run.options.seed, "fold": run.options.fold}
        table = pd.read_csv(folder_of(run, machine) / name)
        tables.append(pd.concat([pd.DataFrame([keys] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def _context(machine: Machine) -> Any:
    """How workers start: on a CPU from a process that has imported the pipeline, which takes each of them seconds."""
    if machine.gpus or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # whose workers have nothing of CUDA before they know their GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tabular_image.run"])
    return context


def _start_worker(slots: Any, gpus: int) -> None:
    """Give the worker its GPU, and let it not outlive a benchmark that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    slot = slots.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(slot % gpus) if gpus else ""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gc.freeze()  # Lightning collects garbage after every run: not among the modules


def _carry_out(run: Run, machine: Machine) -> dict[str, Any] | None:
    """Train, in a worker; the figures of a finished run, or None with the reason in the log."""
    from tabular_image import run as pipeline  # takes seconds, which the command itself need not wait

    folder = folder_of(run, machine)
    log_of(run, machine).parent.mkdir(parents=True, exist_ok=True)
    options = replace(
        run.options,
        data_root=machine.data_root,
        accelerator="cuda" if machine.gpus else "cpu",
        workers=0,
        threads=1,
        out=str(folder),
        pictures=False,
        resume=folder.exists(),
    )
    with log_of(run, machine).open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if not (folder / "results.json").exists():
                pipeline.run(options, _samples(options))
            return _figures(run, folder)
        except Exception as error:
            print(f"error: {error}" if isinstance(error, InputError) else traceback.format_exc())
            return None
        finally:
            for checkpoint in folder.glob("*.ckpt") if (folder / "results.json").exists() else ():
                checkpoint.unlink()


_READ: dict[str, Samples] = {}  # the data set that a worker read last


def _samples(options: Options) -> Samples:
    """The data set; runs of one set follow one another, so a worker reads it once."""
    from tabular_image import run as pipeline
    from tabular_image.data.images import in_memory, without

    names = ("dataset", "data_root", "image_size", "skip_corrupt", *pipeline.SAMPLE_OPTIONS)
    which = repr([getattr(options, name) for name in names])
    if which not in _READ:
        samples = pipeline.read_samples(options)
        if not options.skip_corrupt:
            samples = without(*in_memory(samples, options.image_size or samples.image_size, threads=1), skip=False)
        _READ.clear()
        _READ[which] = samples
    return _READ[which]


def _figures(run: Run, folder: Path) -> dict[str, Any]:
    measured = json.loads((folder / "results.json").read_text())
    test = measured["test"]
    main = next(iter(test))
    figures: dict[str, Any] = {"seed": run.options.seed, "fold": run.options.fold}
    figures |= {name: measured[name] for name in ("val_accuracy", "best_epoch", "epochs", "seconds")}
    figures |= {name: figure["accuracy"] for name, figure in test.items()}
    for fusion, accuracies in measured["fusions"].items():
        figures |= {f"{split}_{fusion}": accuracy for split, accuracy in accuracies.items()}
    figures["balanced_accuracy"] = test[main]["balanced_accuracy"]
    figures["without_table"] = measured["without_table"][main]
    figures |= {f"{split}_rows": measured["split_sizes"][split] for split in ("train", "test")}
    figures |= {f"conflict_{turn['modality']}": turn["conflict"] for turn in measured["conflict"] or []}
    return figures
