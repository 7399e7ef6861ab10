"""Checkpoints that are replaced whole, and the checkpoint that a run goes on from."""

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
    """Writes a checkpoint beside the old one, then replaces the old one. Lightning alone would overwrite in place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file.

        Raises:
            InputError: The file cannot be written; the old file stays as it was.
        """
        save(checkpoint, Path(path))


def save(content: dict[str, Any], path: Path) -> None:
    """Writes tensors and builtin types, whole or not at all.

    Raises:
        InputError: The file cannot be written; the old file stays as it was.
    """
    written = io.BytesIO()  # torch's own writer does not say why it fails
    torch.save(content, written)
    with writing(path) as temporary:
        temporary.write_bytes(written.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, on the CPU.

    Raises:
        InputError: The file is missing, damaged or not a checkpoint.
    """
    return saved(path, {"state_dict", "epoch", "callbacks"}, "checkpoint of a run", _remedy(path.parent))


def saved(path: Path, keys: set[str], what: str, remedy: str) -> dict[str, Any]:
    """The content that `save` wrote, on the CPU.

    Args:
        path: The file.
        keys: What must be in the file.
        what: What the file should be, such as "checkpoint of a run".
        remedy: What the user can do about a wrong file.

    Raises:
        InputError: The file is missing, damaged or something else.
    """
    with border("read", path, remedy):
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load takes altered bytes for weights
                raise ValueError(f"the part {damaged} of the file is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) and keys <= content.keys()):
            raise ValueError(f"the file is not a {what}")
    return content


def load_weights(module: nn.Module, path: Path) -> None:
    """Gives a module the weights of a checkpoint.

    Raises:
        InputError: The checkpoint is missing, damaged, or of another module.
    """
    weights = load(path)["state_dict"]
    with border("use", path, _remedy(path.parent)):
        module.load_state_dict(weights)


def resume_point(folder: Path, module: nn.Module) -> Path | None:
    """The checkpoint that a run goes on from, loaded before any training; None where the folder has no checkpoint.

    Every epoch depends only on the seed and on the epoch before. A run whose last epoch is lost may therefore go on
    from its best epoch, and repeats the epochs in between.

    Args:
        folder: The run folder.
        module: Gets the weights as a trial; the resuming Trainer replaces them.

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
        say(f"{str(error).split(';')[0]}; going on from {best.name}, and training the later epochs again")
        return best
    return last


def _remedy(folder: Path) -> str:
    return (
        f"restore the file, or remove {BEST}.ckpt and {LAST}.ckpt to train from the beginning with "
        f"{resume_command(folder)}"
    )
