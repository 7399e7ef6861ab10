"""Turns and rounds: whose turn it is, the guides' batches (evidence), and how long a batch lives."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gaal_surgery.stats import AlignmentStats


@dataclass(frozen=True)
class Turn:
    """One modality's turn in a round. A round is one turn for every modality.

    Attributes:
        modality: the modality that trains in this turn.
        guides: the modalities whose guides the turn's step must not hurt.

    Example:
        >>> head = torch.nn.Linear(8, 3)
        >>> sgd = torch.optim.SGD(head.parameters(), lr=0.1)
        >>> optimizer = GradientAlignedAlternator(sgd, shared=head)
        >>> for turn in optimizer.turns("image", "table"):
        ...     print(turn.modality, turn.guides)
        image ('table',)
        table ('image',)
    """

    modality: str
    guides: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """A modality's latest batch, as a guide.

    Attributes:
        features: ``(B, ...)``, what the shared module is called on.
        target: ``(B, ...)``, what the loss is called on.
        recorded: the number of the turn in which the batch was recorded.
    """

    features: Tensor
    target: Tensor
    recorded: int


@dataclass
class Round:
    """All state that changes from turn to turn, in one object.

    Trainers wrap the optimizer in objects of their own, and all of these share the round.

    Attributes:
        turn: whose turn it is; None outside a round.
        modalities: the modalities of the open round; empty outside a round.
        turns_begun: how many turns have begun, over all rounds.
        last_turns: by modality, the number of the modality's last turn.
        evidence: by modality, the modality's latest batch.
        stats: the statistics of the last step.
    """

    turn: Turn | None = None
    modalities: tuple[str, ...] = ()
    turns_begun: int = 0
    last_turns: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    stats: AlignmentStats = field(default_factory=AlignmentStats)

    def begin(self, turn: Turn | None, modalities: tuple[str, ...]) -> None:
        """Begin a turn of a round of ``n`` modalities, and drop evidence from before the last ``n - 1`` turns.

        The turn None ends the round.
        """
        self.turn, self.modalities = turn, modalities
        if turn is not None:
            self.turns_begun += 1
            self.last_turns[turn.modality] = self.turns_begun
            oldest = self.turns_begun - len(modalities) + 1
            self.evidence = {name: its for name, its in self.evidence.items() if its.recorded >= oldest}

    @property
    def now(self) -> int:
        """The number of the open turn or, outside a round, of the next turn."""
        return self.turns_begun + (self.turn is None)

    def has_stepped(self, modality: str, since: int) -> bool:
        """Whether a turn of the modality has ended since :attr:`now` was ``since``."""
        return since <= self.last_turns.get(modality, -1) < self.now

    def record(self, modality: str, features: Tensor, target: Tensor, keep: bool) -> None:
        """Drop a modality's earlier batch and, where ``keep`` says so, take this batch in its place."""
        if self.turn is not None and modality not in self.modalities:
            raise ValueError(f"modality must be one of the open round, {self.modalities}, not {modality!r}")
        self.evidence.pop(modality, None)
        if keep:
            self.evidence[modality] = Evidence(features.detach(), target.detach(), self.turns_begun)

    def guides(self) -> tuple[str, ...]:
        """The modalities that guide the next step: the turn's guides or, outside a round, all that have evidence."""
        return tuple(self.evidence) if self.turn is None else self.turn.guides

    def finish(self, guides: Iterable[str], *measured: Tensor | None) -> None:
        """Keep the statistics of a guided step. Outside a round, drop the evidence, which serves one step there."""
        self.stats = AlignmentStats(self.turn.modality if self.turn else None, tuple(guides), *measured)
        if self.turn is None:
            self.evidence.clear()

    def state_dict(self) -> dict[str, Any]:
        """The evidence and its age, in builtin types and tensors."""
        guides = {name: dict(vars(its)) for name, its in self.evidence.items()}
        return {"turns_begun": self.turns_begun, "guides": guides}

    @classmethod
    def from_state_dict(cls, state_dict: Any, device: torch.device) -> "Round":
        """Restore what :meth:`state_dict` gave, between two rounds. None gives a fresh round.

        Raises:
            ValueError: the state is not what :meth:`state_dict` gives.
        """
        if state_dict is None:
            return cls()
        try:
            turns_begun, guides = int(state_dict["turns_begun"]), state_dict["guides"].items()
            moved = [(n, g["features"].to(device), g["target"].to(device), int(g["recorded"])) for n, g in guides]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state_dict['gaal_surgery'] is not what state_dict() gives: {error!r}") from error
        return cls(turns_begun=turns_begun, evidence={name: Evidence(*its) for name, *its in moved})


class Turns(Iterator[Turn]):
    """The turns of one round.

    A turn lasts until the next turn begins, this iterator is exhausted, or :meth:`close` is called. A loop that ends by
    ``break`` or by an error leaves its turn open.
    """

    def __init__(self, current: Round, modalities: tuple[str, ...], every_other: bool) -> None:
        others = [modalities[i + 1 :] + modalities[:i] for i in range(len(modalities))]
        self._turns = [
            Turn(name, its if every_other else its[-1:]) for name, its in zip(modalities, others, strict=True)
        ]
        self._left, self._round = iter(self._turns), current

    def __next__(self) -> Turn:
        """Begin the next turn."""
        turn = next(self._left, None)
        if turn is None:
            self.close()
            raise StopIteration
        self._round.begin(turn, tuple(its.modality for its in self._turns))
        return turn

    def close(self) -> None:
        """End the round, unless another round has begun."""
        if any(turn is self._round.turn for turn in self._turns):
            self._round.begin(None, ())
