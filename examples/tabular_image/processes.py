"""The processes of a run, as the launcher that started them numbers them in the environment."""

from __future__ import annotations

import os
from typing import Any


def nodes() -> int:
    """Machines that torchrun has started the command on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the first process, for torchrun, for Lightning, or for SLURM."""
    numbers = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next(filter(None, numbers), 0)) == 0


def started_together() -> bool:
    """Whether torchrun or SLURM started this process together with others; Lightning starts its own from the first."""
    for started, number in (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if started in os.environ and int(os.environ.get(number, 1)) > 1:
            return True
    return False


def say(*values: object, **settings: Any) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(*values, **settings)
