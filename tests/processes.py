"""Runs a function in several real processes at once, joined in a gloo process group."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

HEAVY = ("torch.distributed.fsdp", "tabular_image.run", "tabular_image.methods", "accelerate", "transformers.trainer")


def run_in_group(count, function, *args):
    """What ``function(*args)`` returns on each of ``count`` ranks; raises what the first failing rank raised."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        futures = [_worker(rank).submit(_call, store, rank, count, function, args) for rank in range(count)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
    if failures:
        # Where one rank fails the others lose their connection to it, which is not the reason.
        raise min(failures, key=lambda failure: "Connection" in str(failure))
    return [future.result() for future in futures]


@cache
def _worker(rank):
    # Kept, as starting a process takes longer than joining a group; and of one rank for ever, as DTensor remembers by
    # the mesh what its shards look like.
    return ProcessPoolExecutor(1, _context())


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
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(minutes=10)
    )
    try:
        result = function(*args)
        gc.collect()  # what is left of reducers keeps threads of older torch's groups from ending
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()
