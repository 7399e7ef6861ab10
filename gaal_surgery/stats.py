"""What surgery met and did: the statistics of one step, and the history of the statistics over training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gaal_surgery.surgery import current_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED = ("cosine_before", "cosine_after", "coefficient", "guide_norm", "intervened", "ignored")
_COLUMNS = ("step", "modality", "guide", "gradient_norm", *_MEASURED)
_HURT = ("hurt_before", "hurt_after")  # where they were measured
_LEGEND_LINE = 14  # points of height for each entry of a legend


def _by_guide(doc: str, measure: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A property, by guide: what ``measure`` makes of the Gramian and the weights, a row for each gradient."""

    def read(stats: "AlignmentStats") -> Mapping[str, Tensor]:
        if stats.gramian is None or stats.weights is None:
            return {}
        return dict(zip(stats.guides, measure(stats.gramian, stats.weights)[1:].unbind(), strict=True))

    return property(read, doc=doc)


def _hurt_by_guide(doc: str, when: int) -> Any:
    """A property, by guide: the share of samples that a step hurts, before or after surgery."""

    def read(stats: "AlignmentStats") -> Mapping[str, Tensor]:
        return {} if stats.hurt is None else dict(zip(stats.guides, stats.hurt[when].unbind(), strict=True))

    return property(read, doc=doc)


def _cosines(gramian: Tensor, weights: Tensor) -> Tensor:
    """Cosine of the weighted sum with every row; 0 where either has length 0 or is not finite."""
    usable = gramian.diagonal().isfinite()
    gramian = torch.where(usable & usable[:, None], gramian, 0)
    products = gramian @ weights
    norms = (gramian.diagonal() * (weights @ products).clamp(min=0)).sqrt()
    return torch.where(norms > 0, products / norms, 0)


@dataclass(frozen=True)
class AlignmentStats:
    """Statistics of one aligned step. Most are mappings by guide, and are empty if the step had no guide.

    The statistics are derived from the step's Gramian when they are read, as 0-dim tensors on the Gramian's device.
    Reading costs a few small kernels and no synchronisation. Statistics that are not read cost nothing. Only
    ``hurt_before`` and ``hurt_after`` are measured in the step itself, with ``measure_hurt=True``; otherwise they are
    empty.

    Attributes:
        modality: whose turn it was; None outside ``turns``.
        guides: the modalities that guided, in the order of the Gramian's rows 1 to m.
        gramian: ``(m + 1, m + 1)`` inner products. Row 0 is the gradient. With ``align="update"`` row 0 is the negative
            applied update.
        weights: ``(m + 1,)``, what the rule made of the Gramian.
        hurt: ``(2, m)``, the shares behind ``hurt_before`` and ``hurt_after``; None where they were not measured.

    Example:
        >>> opposed = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
        >>> stats = AlignmentStats("image", ("table",), opposed, HalfSpace()(opposed))
        >>> stats.cosine_before, stats.cosine_after
        ({'table': tensor(-0.5000)}, {'table': tensor(0.)})
    """

    modality: str | None = None
    guides: tuple[str, ...] = ()
    gramian: Tensor | None = None
    weights: Tensor | None = None
    hurt: Tensor | None = None

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the gradient before surgery, over the whole shared module."""
        return None if self.gramian is None else self.gramian[0, 0].sqrt()

    guide_norm = _by_guide("Norm of each guide; not finite for an ignored guide.", lambda g, w: g.diagonal().sqrt())
    cosine_before = _by_guide(
        "Cosine between the gradient and each guide (Eq. 2). Below 0 is a conflict; 0 where a norm is 0.",
        lambda g, w: _cosines(g, current_only(g)),
    )
    cosine_after = _by_guide("Cosine between the aligned gradient and each guide.", _cosines)
    coefficient = _by_guide("The multiple of each guide that surgery added (v of Eq. 5).", lambda g, w: w)
    intervened = _by_guide("Whether surgery added any of each guide, as boolean tensors.", lambda g, w: w != 0)
    ignored = _by_guide("Whether each guide was ignored, as it was not finite.", lambda g, w: ~g.diagonal().isfinite())
    hurt_before = _hurt_by_guide("Share of each guide's selected samples that the step hurts before surgery.", 0)
    hurt_after = _hurt_by_guide("Share of each guide's selected samples that the step hurts after surgery.", 1)


class ConflictMonitor:
    """Collects the :class:`AlignmentStats` of a training run, and shows how often the modalities were in conflict.

    A turn and a guide are in conflict in a step where the cosine between their gradients is below 0 before surgery.
    Call :meth:`update` after every step. Nothing is moved off the device until a table or a plot is asked for.

    Example:
        >>> monitor = ConflictMonitor()
        >>> opposed = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
        >>> stats = AlignmentStats("image", ("table",), opposed, HalfSpace()(opposed))
        >>> monitor.update(stats)
        >>> monitor.history()["cosine_before"]
        [-0.5]
        >>> monitor.summary()[0]["conflict"]
        1.0
    """

    def __init__(self) -> None:
        self._steps = 0
        self._unread: list[tuple[int, AlignmentStats]] = []
        self._rows: list[dict[str, Any]] = []

    def update(self, stats: AlignmentStats) -> None:
        """Record the statistics of one step. A step without guides counts as a step and leaves no row."""
        if stats.guides:
            self._unread.append((self._steps, stats))
        self._steps += 1

    def history(self) -> dict[str, list[Any]]:
        """One row for every step and guide, as columns: ``pandas.DataFrame(monitor.history())``.

        Returns:
            The columns ``step``, ``modality`` (whose turn), ``guide``, ``gradient_norm``, ``cosine_before``,
            ``cosine_after``, ``coefficient``, ``guide_norm``, ``intervened`` and ``ignored``, as lists of one length.
            If a step measured them, ``hurt_before`` and ``hurt_after`` follow, with None for steps that did not.
        """
        rows = self._read()
        measured = [name for name in _HURT if any(name in row for row in rows)]
        return {column: [row.get(column) for row in rows] for column in (*_COLUMNS, *measured)}

    def summary(self) -> list[dict[str, Any]]:
        """One row for every turn and guide: how often the two were in conflict, and how often surgery intervened.

        Returns:
            Rows with ``modality``, ``guide``, ``steps``, ``conflict`` (share of steps with a cosine below 0 before
            surgery), ``intervened`` (share of steps), ``cosine_before`` and ``cosine_after`` (means). If a step
            measured them, ``hurt_before`` and ``hurt_after`` are means over the steps that did.
        """
        return [
            {"modality": modality, "guide": guide, "steps": len(rows)}
            | {"conflict": fmean(row["cosine_before"] < 0 for row in rows)}
            | {name: fmean(row[name] for row in rows) for name in ("intervened", "cosine_before", "cosine_after")}
            | _mean_hurt(rows)
            for (modality, guide), rows in self._groups().items()
        ]

    def plot(self, ax: "Axes | None" = None, *, smooth: int | None = None) -> "Axes":
        """Draw the cosine before surgery over the steps, by turn and guide, as in the paper's Figure 1(a).

        Points are single steps, and lines are their running means. The axis spans the cosines and 0. The legend holds
        the share of steps in conflict and, where it was measured, the mean share of samples that a step hurts before
        and after surgery.

        Args:
            ax: where to draw; None makes a new figure.
            smooth: steps in the running mean drawn over the single steps; None takes a fiftieth of the history.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no step with a guide was recorded yet.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("ConflictMonitor.plot draws with matplotlib: pip install 'gaal_surgery[plot]'") from error
        groups = self._groups()
        if not groups:
            raise ValueError("nothing to plot: call update(optimizer.stats) after steps that had a guide")
        if ax is None:
            _, ax = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        series = {}
        for (modality, guide), rows in groups.items():
            cosines = [row["cosine_before"] for row in rows]
            turn = f"{modality}'s turn, " if modality is not None else ""
            label = f"{turn}guide {guide}: {fmean(cosine < 0 for cosine in cosines):.0%} of steps in conflict"
            if hurt := _mean_hurt(rows):
                label += ", hurt samples {hurt_before:.0%}, after surgery {hurt_after:.0%}".format_map(hurt)
            series[label] = ([row["step"] for row in rows], cosines)
        plot_cosines(ax, series, smooth)
        ax.set(xlabel="step", ylabel="cosine before surgery")
        return ax

    def state_dict(self) -> dict[str, Any]:
        """The history in builtin types, for a checkpoint that loads under ``weights_only=True``."""
        return {"steps": self._steps, "rows": [dict(row) for row in self._read()]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint; the present history is dropped."""
        self._steps = state_dict["steps"]
        self._unread = []
        self._rows = [dict(row) for row in state_dict["rows"]]

    def _groups(self) -> dict[tuple[str | None, str], list[dict[str, Any]]]:
        """The rows of every turn and guide."""
        groups: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
        for row in self._read():
            groups.setdefault((row["modality"], row["guide"]), []).append(row)
        return groups

    def _read(self) -> list[dict[str, Any]]:
        """All rows, after reading what was not read yet."""
        for step, stats in self._unread:
            for guide in stats.guides:
                row = {"step": step, "modality": stats.modality, "guide": guide, "gradient_norm": stats.gradient_norm}
                row |= {name: getattr(stats, name)[guide] for name in _MEASURED}
                row |= {name: getattr(stats, name)[guide] for name in _HURT if stats.hurt is not None}
                self._rows.append({k: x.item() if isinstance(x, Tensor) else x for k, x in row.items()})
        self._unread.clear()
        return self._rows


def plot_cosines(
    ax: "Axes", series: Mapping[str, tuple[Sequence[float], Sequence[float]]], smooth: int | None = None
) -> None:
    """Draw cosines over a training as every picture of conflicts shows them: points, running means and a line at 0.

    The vertical axis spans the data and 0, with room for the legend above them.

    Args:
        ax: where to draw.
        series: by entry of the legend, the places along the training and the cosines there, N of each.
        smooth: cosines in the running mean, drawn at the last of them; None takes a fiftieth of the series.
    """
    for label, (places, values) in series.items():
        cosines = torch.tensor(values)
        window = min(len(cosines), smooth or max(1, len(cosines) // 50))
        (line,) = ax.plot(places[window - 1 :], cosines.unfold(0, window, 1).mean(dim=1), label=label)
        size = min(16, max(4, 4000 / len(cosines)))  # points stay visible where they are few, and apart where many
        ax.scatter(places, cosines, s=size, alpha=0.35, color=line.get_color(), linewidths=0)
    ax.axhline(0, color="black", linewidth=0.8)
    height = 72 * ax.get_window_extent().height / ax.figure.dpi
    room = min(0.5, _LEGEND_LINE * (len(series) + 0.5) / height)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + room / (1 - room) * (high - low))
    ax.legend(loc="upper left", fontsize="small", frameon=False)


def _mean_hurt(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean shares of hurt samples over the rows that measured them; empty where no row did."""
    measured = [row for row in rows if _HURT[0] in row]
    return {name: fmean(row[name] for row in measured) for name in _HURT if measured}
