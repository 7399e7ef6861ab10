"""Checkpoints that are replaced whole, and the one that a run goes on from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from .errors import InputError, border
from .files import resume_command, writing
from .processes import say

BEST, LAST = "best", "last"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and then in its place, where Lightning alone would write over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file.

        Raises:
            InputError: It cannot be written; the old one is as it was.
        """
        save(checkpoint, Path(path))


def save(content: dict[str, Any], path: Path) -> None:
    """Writes tensors and builtin types, whole or not at all.

    Raises:
        InputError: The file cannot be written; the old one is as it was.
    """
    written = io.BytesIO()  # torch's own writer does not say why it fails
    torch.save(content, written)
    with writing(path) as temporary:
        temporary.write_bytes(written.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, on the CPU.

    Raises:
        InputError: It is missing, damaged or something else.
    """
    return saved(path, {"state_dict", "epoch", "callbacks"}, "checkpoint of a run", _remedy(path.parent))


def saved(path: Path, keys: set[str], what: str, remedy: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Args:
        path: The file.
        keys: What must be in the file.
        what: What the file is.
        remedy: What to do where the file is not that.

    Raises:
        InputError: The file is missing, damaged or something else.
    """
    with border("read", path, remedy):
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load takes altered bytes for weights
                raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) and keys <= content.keys()):
            raise ValueError(f"it is no {what}")
    return content


def load_weights(module: nn.Module, path: Path) -> None:
    """Gives a module the weights of a checkpoint.

    Raises:
        InputError: It is missing, damaged, or of another module.
    """
    weights = load(path)["state_dict"]
    with border("use", path, _remedy(path.parent)):
        module.load_state_dict(weights)


def resume_point(folder: Path, module: nn.Module) -> Path | None:
    """The checkpoint that a run goes on from, tried before any training; None where the folder has none.

    Every epoch depends on the seed and on the epoch before it alone. A run whose last epoch is lost may therefore go on
    from its best one, and repeats the epochs in between.

    Args:
        folder: The run folder.
        module: Is given weights, which the resuming Trainer replaces.

    Raises:
        InputError: The best epoch, which is tested at the end, cannot be read.
    """
    best, last = (folder / f"{name}.ckpt" for name in (BEST, LAST))
    if not best.exists() and not last.exists():
        return None
    load_weights(module, best)
    try:
        load_weights(module, last)
    except InputError as error:
        say(f"{str(error).split(';')[0]}; going on from {best.name}, whose later epochs are trained again")
        return best
    return last


def _remedy(folder: Path) -> str:
    return (
        f"restore it, or remove {BEST}.ckpt and {LAST}.ckpt to train from the beginning with {resume_command(folder)}"
    )
