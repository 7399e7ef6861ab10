"""Which samples guide the surgery, and their gradient: uncertainty scores, selection, the guide gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gaal_surgery.distributed import SharedRows
from gaal_surgery.per_sample import (
    LossFn,
    as_input,
    evaluate,
    frozen,
    logit_gradient,
    pull_back,
    pulled_back_norms,
)

Uncertainty = Callable[[Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats: the uncertainty score of the paper (Eq. 6).

    Args:
        logits: ``(B, C)`` with ``C >= 2``.

    Returns:
        ``(B,)`` in [0, log C], float32 or wider.

    Raises:
        ValueError: the logits are not ``(B, C)``, or have a single column.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), not {tuple(logits.shape)}: pass another `uncertainty` for them")
    if logits.shape[1] == 1:
        raise ValueError(
            "logits have a single column, whose softmax entropy is always 0: for a binary head pass "
            "uncertainty=lambda logits: -logits.squeeze(1).abs()"
        )
    log_q = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # entr(0) is 0: a class that is out of the question contributes nothing.
    scores: Tensor = torch.special.entr(log_q.exp()).sum(dim=1)
    return scores


def select_uncertain(scores: Tensor, fraction: float) -> Tensor:
    """Positions of the most uncertain samples (Eq. 7).

    Args:
        scores: ``(B,)``, higher is harder. NaN counts as hardest.
        fraction: lambda of the paper, the share to select, in (0, 1].

    Returns:
        ``(k,)`` int64 with ``k = max(1, floor(fraction * B))``, hardest first; ties keep the order of the batch.

    Raises:
        ValueError: ``scores`` is not a non-empty vector, or ``fraction`` is outside (0, 1].
    """
    check_fraction(fraction)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (B,) with B >= 1, not {tuple(scores.shape)}: give one score a sample")
    count = max(1, math.floor(fraction * len(scores)))
    return torch.argsort(scores, descending=True, stable=True)[:count]


def guide_gradient(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, *, max_norm: float | None = None
) -> dict[str, Tensor]:
    """Mean gradient of the given samples on the shared module, the paper's g_p (Eq. 8), in one backward pass.

    The module runs in eval mode (running statistics, no dropout) and in its own precision, autocast or not. Nothing in
    it changes: no parameter, buffer or ``.grad``.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``, treated as constants.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        max_norm: clip each sample's gradient to this norm before the mean; None does not clip.

    Returns:
        By parameter name, the shape of the parameter. Frozen parameters are left out.

    Raises:
        TypeError: ``max_norm`` is not a number.
        ValueError: features and target differ in length, the module cannot take the features, the loss cannot take the
            target or is not a scalar, or ``max_norm`` is not positive.
    """
    check_max_norm(max_norm)
    with frozen(shared, features):
        features = as_input(shared, features, target)
        cotangents = logit_gradient(evaluate(shared, features), target, loss_fn)
        return _mean_gradient(shared, features, cotangents, len(features), max_norm)


@dataclass(frozen=True)
class Evidence:
    """One modality's batch as a guide: ``(B, ...)`` features and target, and the share of it to select."""

    features: Tensor
    target: Tensor
    fraction: float


def uncertain_gradients(
    shared: nn.Module,
    guides: Mapping[str, Evidence],
    loss_fn: LossFn,
    *,
    uncertainty: Uncertainty,
    max_norm: float | None,
    rows: SharedRows | None = None,
) -> list[dict[str, Tensor]]:
    """Eqs. 6-8 in a row, for each guide: score the samples, select the most uncertain, return their mean gradient.

    With several ranks, samples are scored and selected among the rows of all, and so is the loss taken, whose class
    weights may span them; each rank pulls back the rows that it holds, and the sum is everyone's gradient.

    Args:
        shared: module from features to logits.
        guides: by modality.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        uncertainty: ``logits -> (B,)``.
        max_norm: as in :func:`guide_gradient`.
        rows: how the batches lie on several ranks; None for a single process.

    Raises:
        ValueError: as :func:`guide_gradient`, or ``uncertainty`` does not return one score a sample.
    """
    with frozen(shared, next(iter(guides.values())).features):
        inputs, outputs = {}, {}
        for name, guide in guides.items():
            with _naming(name):
                inputs[name] = as_input(shared, guide.features, guide.target)
                outputs[name] = evaluate(shared, inputs[name])
        targets = {name: guide.target for name, guide in guides.items()}
        if rows is not None:
            outputs, targets = rows.gather(outputs, targets)
        gradients = []
        for name, guide in guides.items():
            with _naming(name):
                logits = outputs[name]
                chosen = _select(logits, guide.fraction, uncertainty)
                cotangents = logit_gradient(logits[chosen], targets[name][chosen], loss_fn)
                if rows is None:
                    features = inputs[name][chosen]
                else:
                    # Only the device knows which of the chosen rows are ours: the others of our rows pull back zeros.
                    features = inputs[name]
                    cotangents = rows.own(name, torch.zeros_like(logits).index_copy(0, chosen, cotangents))
                gradients.append(_mean_gradient(shared, features, cotangents, len(chosen), max_norm))
        return gradients if rows is None else rows.sum(gradients)


def check_fraction(fraction: float) -> None:
    """Raise unless ``fraction`` is a number in (0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number in (0, 1], not {type(fraction).__name__}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}: it is the share of samples that guide")


def check_max_norm(max_norm: float | None) -> None:
    """Raise unless ``max_norm`` is None or positive."""
    if max_norm is None:
        return
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
        raise TypeError(f"max_norm must be a number or None, not {type(max_norm).__name__}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, or None for no clipping, not {max_norm}")


def _select(logits: Tensor, fraction: float, uncertainty: Uncertainty) -> Tensor:
    scores = uncertainty(logits)
    if scores.shape != logits.shape[:1]:
        raise ValueError(f"uncertainty must return one score a sample, ({len(logits)},), not {tuple(scores.shape)}")
    return select_uncertain(scores, fraction)


def _mean_gradient(
    shared: nn.Module, features: Tensor, cotangents: Tensor, count: int, max_norm: float | None
) -> dict[str, Tensor]:
    """These rows' part of the mean over ``count`` samples."""
    if max_norm is not None:
        # Clipping a sample's gradient scales its row: the mean of the clipped gradients is still one backward pass.
        norms = count * pulled_back_norms(shared, features, cotangents)
        scale = (max_norm / norms).clamp(max=1).to(cotangents.dtype)
        cotangents = cotangents * scale.view(-1, *[1] * (cotangents.ndim - 1))
    return pull_back(shared, features, cotangents)


@contextmanager
def _naming(modality: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"guide {modality!r}: {error}") from error
