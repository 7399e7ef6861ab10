"""Runs a function in several real processes at once, joined in a gloo process group."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import sys
import tempfile
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


def run_in_group(count, function, *args):
    """What ``function(*args)`` returns on each of ``count`` ranks; raises what the first failing rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        futures = [_worker(rank).submit(_call, store, rank, count, function, args) for rank in range(count)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for rank in range(count):
            _leave_group(rank)
    if failures:
        # Where one rank fails the others lose their connection to it, which is not the reason.
        raise min(failures, key=lambda failure: "Connection" in str(failure))
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
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
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
