"""Base of the methods that record whether their gradients conflict."""

from __future__ import annotations

from typing import Any

from gaal_surgery import ConflictMonitor

from .base import Method


class Monitored(Method):
    """A method whose checkpoints hold the history of its monitor. The report of a run draws this history.

    Attributes:
        monitor: cosines between gradients over the training; None where nothing is measured.
    """

    monitor: ConflictMonitor | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the monitor's history."""
        if self.monitor is not None:
            checkpoint["monitor"] = self.monitor.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the monitor's history."""
        if self.monitor is not None:
            self.monitor.load_state_dict(checkpoint["monitor"])
