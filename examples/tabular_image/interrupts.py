"""Ctrl-C and SIGTERM: an interrupted run says how to go on, and exits with 128 plus the number of the signal."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from .files import resume_command

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asks the run to end. Lightning lets this pass, but ends the process itself at a KeyboardInterrupt."""


class Interrupts:
    """The signals of one process.

    Attributes:
        received: The number of the signal that came; None without a signal.
        folder: The run folder, existing or to be made; None before the folder is chosen.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.folder: Path | None = None
        self._process: int | None = None

    def catch(self) -> None:
        """Raises `Interrupted` at each signal from now on."""
        self._process = os.getpid()
        self.catch_again()

    def catch_again(self) -> None:
        """Sets the handlers again in a process that catches, as Lightning replaces the handler of SIGTERM."""
        if self._process == os.getpid():
            for number in _SIGNALS:
                signal.signal(number, self._raise)

    def ignore(self) -> None:
        """Ignores the signals of a process that catches, which is about to end."""
        if self._process == os.getpid():
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def sentence(self) -> str:
        """What to tell the user."""
        if self.folder is None or not (self.folder / "config.yaml").is_file():
            return "interrupted before the training; run the same command to start again"
        saved = any(self.folder.glob("*.ckpt"))
        state = "the finished epochs are saved" if saved else "no epoch was saved yet"
        return f"interrupted; {state}; go on with {resume_command(self.folder)}"

    def _raise(self, number: int, frame: Any) -> None:
        if self._process != os.getpid():
            return  # a worker that was forked; the main process ends it
        self.received = number
        raise Interrupted


interrupts = Interrupts()
