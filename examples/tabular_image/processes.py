"""The processes of a run, as numbered by their launcher in environment variables."""

from __future__ import annotations

import os
from typing import Any


def nodes() -> int:
    """The number of machines that torchrun has started the command on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the first process, for torchrun, for Lightning, or for SLURM."""
    numbers = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next(filter(None, numbers), 0)) == 0


def started_together() -> bool:
    """Whether torchrun or SLURM started several processes together; Lightning starts the others from the first one."""
    for started, number in (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if started in os.environ and int(os.environ.get(number, 1)) > 1:
            return True
    return False


def say(*values: object, **settings: Any) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(*values, **settings)
