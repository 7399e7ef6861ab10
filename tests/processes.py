"""Runs a function in several real processes at once, joined in a gloo process group."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

HEAVY = ("torch.distributed.fsdp", "tabular_image.run", "tabular_image.methods", "accelerate", "transformers.trainer")
PATIENCE = 600  # seconds after which a rank that waits says where, and ends
_WORKERS = {}


class RankCrashError(Exception):
    """A signal ended a rank's process; the text says which, and what the process's threads did."""


def run_in_group(count, function, *args):
    """What ``function(*args)`` returns on each of ``count`` ranks; raises what the first failing rank raised.

    A group of which a rank crashes runs once more, with a warning: under torch 2.14, gloo's own thread found its heap
    corrupted once in some thousand groups. What crashes always is raised.
    """
    try:
        return _run_in_group(count, function, *args)
    except RankCrashError as crash:
        warnings.warn(f"A rank crashed, and its group runs again: {crash}", stacklevel=2)
        return _run_in_group(count, function, *args)


def _run_in_group(count, function, *args):
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        futures = [_worker(rank).submit(_call, store, rank, count, function, args) for rank in range(count)]
        processes = multiprocessing.active_children()
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        signals = [-process.exitcode for process in processes if (process.exitcode or 0) < 0]
        for rank in range(count):
            _leave_group(rank)
        reports = "".join(report.read_text() for report in sorted(Path(folder).glob("report*")))
    if signals:
        raise RankCrashError(f"{signal.Signals(signals[0]).name}\n{reports}")
    if failures:
        # Where one rank fails the others lose their connection to it, which is not the reason.
        failure = min(failures, key=lambda failure: "Connection" in str(failure))
        if reports:
            failure.add_note(reports)
        raise failure
    return [future.result() for future in futures]


def _worker(rank):
    # Kept, as starting a process takes longer than joining a group; and of one rank for ever, as DTensor remembers by
    # the mesh what its shards look like.
    if rank not in _WORKERS:
        _WORKERS[rank] = ProcessPoolExecutor(1, _context())
    return _WORKERS[rank]


def _leave_group(rank):
    """Ends the rank's membership, and its process where it cannot: torch 2.6 may wait for its own threads for ever."""
    try:
        _worker(rank).submit(_leave).result()
    except BrokenProcessPool:
        _WORKERS.pop(rank).shutdown()


@cache
def _context():
    """Where it can be, processes are forked from one that has imported what takes seconds, and runs nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", *(name for name in HEAVY if name in sys.modules)])
    return context


def _call(store, rank, count, function, args):
    gc.freeze()  # so that the collection below visits what this call makes, and not the modules again
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = store.with_name(f"report{rank}").open("w")  # open for as long as the process may crash
    faulthandler.disable()  # Lightning takes the handlers off behind faulthandler's back, which would not enable twice
    faulthandler.enable(report)
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=report)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE / 2)
    )
    try:
        result = function(*args)
        dist.barrier()
        return result
    except BaseException:
        dist.destroy_process_group()  # so that the others do not wait for this rank
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def _leave():
    faulthandler.dump_traceback_later(PATIENCE / 5, exit=True)
    gc.collect()  # what is left of reducers keeps threads of older torch's groups from ending
    if dist.is_initialized():
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
