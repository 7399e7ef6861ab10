"""Runs of the pipeline, carried out in parallel. A results file keeps one line for each finished run."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import classical
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tabular_image import run as pipeline
from tabular_image.data import Samples
from tabular_image.data.features import with_features
from tabular_image.data.identity import fingerprinted, identity
from tabular_image.data.images import in_memory, without
from tabular_image.errors import InputError
from tabular_image.files import replacing
from tabular_image.methods.fusion import FUSIONS
from tabular_image.options import Options
from tqdm import tqdm

VERSION = 3  # of the columns and their meaning; raise the version when either changes
COLUMNS = (
    *("version", "set", "row", "seed", "fold"),
    *("val_accuracy", "best_epoch", "epochs", "seconds"),
    *("fused", "image", "table"),
    *(f"{split}_{fusion}" for split in ("val", "test") for fusion in FUSIONS),
    *(f"balanced_{fusion}" for fusion in FUSIONS),
    *("balanced_accuracy", "without_table", "train_rows", "test_rows"),
    *("conflict_image", "conflict_table"),
    "configuration",
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        set: the benchmark's name of the data set.
        row: the benchmark's name of the method with its settings.
        options: all options of the run. Options about the machine are ignored.
        data: digest of the data set, see `tabular_image.data.identity`.
    """

    set: str
    row: str
    options: Options
    data: str

    @cached_property
    def key(self) -> str:
        """The full configuration and the digest of the data as JSON. Two runs with equal keys have equal results."""
        return json.dumps(self.options.configuration() | {"data": self.data}, sort_keys=True)

    @property
    def folder(self) -> str:
        """A folder name for the run."""
        return f"{self.set}-{self.row}-{hashlib.sha256(self.key.encode()).hexdigest()[:12]}"


class Results:
    """A CSV file with one line for each finished run. The key is the run's full configuration and the data's digest.

    Args:
        path: the file, which is created with the first line.

    Raises:
        SystemExit: The file is of another version, is no results file, or cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            content = _whole_lines(self.path)
            if not content:
                return
            frame = pd.read_csv(io.BytesIO(content))
        except OSError as error:
            raise SystemExit(f"error: {self.path} cannot be read ({error.strerror}); give another --results") from error
        except ValueError as error:
            raise SystemExit(f"error: {self.path} is no results file ({error}); give another --results") from error
        versions = set(frame.get("version", [None] * len(frame)))
        if tuple(frame) != COLUMNS or not versions <= {VERSION}:
            found = ", ".join(map(str, versions - {None})) or "unknown"
            raise SystemExit(
                f"error: {self.path} holds results of version {found}, and this benchmark reads and writes version "
                f"{VERSION}; keep the file for the release that wrote the file, and give another --results"
            )
        self._rows = {_completed(row["configuration"]): row for row in frame.to_dict("records")}

    def __contains__(self, run: Run) -> bool:
        return run.key in self._rows

    def __getitem__(self, run: Run) -> dict[str, Any]:
        """The line of a finished run, with the names that this benchmark gives to the run's set and row."""
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
        """The lines of the finished ones among the runs."""
        return pd.DataFrame([self[run] for run in runs if run in self], columns=list(COLUMNS))

    def digests(self, shared: Mapping[str, Any]) -> set[str]:
        """The digests of the data of all finished runs that have the given options.

        Args:
            shared: options by name. Other options may have any value.
        """
        stored = map(json.loads, self._rows)
        return {one["data"] for one in stored if all(one.get(name) == value for name, value in shared.items())}


def _completed(key: str) -> str:
    """The key of a stored run, completed by the defaults of options that did not exist when the run was stored."""
    stored = json.loads(key)
    return json.dumps(Options(method=stored["method"]).configuration() | stored, sort_keys=True)


def _whole_lines(path: Path) -> bytes:
    """The whole lines of a file. A last line without an end is dropped: a crash interrupted its writing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


@dataclass(frozen=True)
class Machine:
    """How runs are carried out. These options change no result.

    Attributes:
        data_root: folder with one folder for each data set.
        folder: folder of the run folders. An interrupted run continues from its run folder.
        jobs: number of runs at a time, one thread each.
        gpus: number of GPUs over which the runs are spread; 0 trains on the CPU.
        progress: show a progress bar.
    """

    data_root: str = "data"
    folder: str = "runs/accuracy"
    jobs: PositiveInt = 2
    gpus: NonNegativeInt = 0
    progress: bool = True


@contextlib.contextmanager
def opened(path: Path | str, machine: Machine | None) -> Iterator[Results]:
    """The results file. Until the block ends, this file and the folder of the runs are locked for other benchmarks.

    The operating system drops the locks of a process that dies.

    Args:
        path: the results file.
        machine: names the folder of the runs. None only reads the results, without a lock.

    Raises:
        SystemExit: Another benchmark is at work there, or a place cannot be written.
    """
    if machine is None:
        yield Results(path)
        return
    path, folder = Path(path).resolve(), Path(machine.folder).resolve()
    locks = {"--results": (path, path.with_name(f".{path.name}.lock")), "--machine.folder": (folder, folder / ".lock")}
    with contextlib.ExitStack() as held:
        for option, (place, lock) in locks.items():
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                raise SystemExit(
                    f"error: another benchmark is at work on {place}; wait for its end, or give another {option}"
                ) from None
            except (OSError, NotImplementedError) as error:
                raise SystemExit(f"error: {place} cannot be written ({error}); give another {option}") from error
        results = Results(path)
        whole = len(_whole_lines(path))
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        yield results


def complete(runs: Sequence[Run], results: Results, machine: Machine, needs: str = "") -> None:
    """Carry out the unfinished runs, in parallel.

    The results file gets the line of a run as soon as the run finishes. The other runs go on when one run fails.

    Args:
        runs: the runs. Finished runs are not repeated.
        results: gets a line for every run that finishes.
        machine: how the runs are carried out.
        needs: a file that a finished run's folder must also hold, such as `metrics.csv`.

    Raises:
        SystemExit: A run failed, or a process was killed. For a failed run the message names the run and its log.
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
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit this: the parent alone answers Ctrl-C
        started = {pool.submit(_carry_out, run, machine): run for run in missing}
        signal.signal(signal.SIGINT, before)
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
                "error: a training process was killed, perhaps because memory ran out; lower --machine.jobs and start "
                f"again to continue (finished runs are in {results.path})"
            ) from error
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True, wait=False)
            for worker in multiprocessing.active_children():
                worker.kill()
            print(f"interrupted; finished runs are in {results.path}, start again to continue", file=sys.stderr)
            raise SystemExit(130) from None
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise SystemExit(
            f"error: {failed[0].set} {failed[0].row} (seed {failed[0].options.seed}){more} of {len(missing)} runs "
            f"failed, see {log_of(failed[0], machine)}; finished runs are in {results.path}"
        )


def folder_of(run: Run, machine: Machine) -> Path:
    """The folder of a run."""
    return Path(machine.folder) / run.folder


def log_of(run: Run, machine: Machine) -> Path:
    """The file with the printed output of a run."""
    return folder_of(run, machine).with_suffix(".log")


def histories(runs: Sequence[Run], machine: Machine, name: str) -> pd.DataFrame:
    """The CSV file `name` of every run's folder in one table, after the columns `set`, `row`, `seed` and `fold`."""
    tables = []
    for run in runs:
        keys = {"set": run.set, "row": run.row, "seed": run.options.seed, "fold": run.options.fold}
        table = pd.read_csv(folder_of(run, machine) / name)
        tables.append(pd.concat([pd.DataFrame([keys] * len(table)), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def _context(machine: Machine) -> Any:
    """How workers start. On a CPU workers fork from a process that imported the pipeline, which saves seconds each."""
    if machine.gpus or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # CUDA starts in a worker only after it knows its GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tabular_image.run"])
    return context


def _start_worker(slots: Any, gpus: int) -> None:
    """Give the worker its GPU, and end the worker when the benchmark is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    slot = slots.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(slot % gpus) if gpus else ""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tqdm.set_lock(threading.RLock())  # tqdm's own semaphore makes Python warn after a worker is killed
    gc.freeze()  # Lightning collects garbage after every run; this leaves out the modules


def _carry_out(run: Run, machine: Machine) -> dict[str, Any] | None:
    """Train in a worker. Returns the figures of a finished run, or None with the reason in the log."""
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
                carried_out = classical.run if options.method in classical.MODELS else pipeline.run
                carried_out(options, _samples(options, run.data, Path(machine.folder)))
            return figures_of(run, folder)
        except Exception as error:
            print(f"error: {error}" if isinstance(error, InputError) else traceback.format_exc())
            return None
        finally:
            for checkpoint in folder.glob("*.ckpt") if (folder / "results.json").exists() else ():
                checkpoint.unlink()


_READ: dict[str, Samples] = {}  # the data set that a worker read last


def _samples(options: Options, data: str, folder: Path) -> Samples:
    """The data set. Runs of one set follow one another, so that a worker reads the set once.

    Raises:
        InputError: The digest of the data set is no longer `data`, or the data cannot be read.
    """
    names = ("dataset", "data_root", "image_size", "image_encoder", "skip_corrupt", *pipeline.SAMPLE_OPTIONS)
    which = repr([data, *(getattr(options, name) for name in names)])
    if which not in _READ:
        samples = fingerprinted(pipeline.read_samples(options))
        if identity(samples).digest != data:
            raise InputError(
                f"the data of {samples.name} changed while the benchmark was at work; restore the data, or start the "
                "benchmark again to train on the changed data"
            )
        if options.image_encoder == "features" and not options.skip_corrupt:
            samples = _with_features(samples, options.image_size or samples.image_size, data, folder)
        elif not options.skip_corrupt:
            samples = without(*in_memory(samples, options.image_size or samples.image_size, threads=1), skip=False)
        _READ.clear()
        _READ[which] = samples
    return _READ[which]


def _with_features(samples: Samples, size: int, data: str, folder: Path) -> Samples:
    """The data set with the features of its pictures. Computing takes a minute once; later runs read a file."""
    place = folder / f"features-{data}-{size}-{version('scikit-image')}.npy"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            with replacing(place) as temporary, temporary.open("wb") as file:
                np.save(file, with_features(samples, size, skip=False).features)
        return replace(samples, features=np.load(place))


def figures_of(run: Run, folder: Path) -> dict[str, Any]:
    """The figures of a finished run by column. An undefined figure is nan."""
    measured = json.loads((folder / "results.json").read_text())
    test = measured["test"]
    main = next(iter(test))
    figures: dict[str, Any] = {"seed": run.options.seed, "fold": run.options.fold}
    figures |= {name: measured[name] for name in ("val_accuracy", "best_epoch", "epochs", "seconds")}
    figures |= {name: figure["accuracy"] for name, figure in test.items()}
    for fusion, accuracies in measured["fusions"].items():
        figures |= {f"{split}_{fusion}": accuracy for split, accuracy in accuracies.items()}
    for fusion, by_split in measured["fusion_measures"].items():
        figures[f"balanced_{fusion}"] = by_split["test"]["balanced_accuracy"]
    figures["balanced_accuracy"] = test[main]["balanced_accuracy"]
    figures["without_table"] = measured["without_table"][main]
    figures |= {f"{split}_rows": measured["split_sizes"][split] for split in ("train", "test")}
    figures |= {f"conflict_{turn['modality']}": turn["conflict"] for turn in measured["conflict"] or []}
    return {name: math.nan if value is None else value for name, value in figures.items()}
