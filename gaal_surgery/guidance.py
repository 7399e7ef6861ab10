"""Guides: uncertainty scores, the selection of uncertain samples, and the gradient of the selected samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gaal_surgery.functional as functional
from gaal_surgery.functional import LossFn, SharedFunction, Trace
from gaal_surgery.per_sample import pulled_back_norms, pulled_back_products
from gaal_surgery.rounds import Evidence
from gaal_surgery.rows import SharedRows
from gaal_surgery.surgery import check_number

Uncertainty = Callable[[Tensor], Tensor]
Choice = Callable[[str, Tensor], Tensor]
Settings = tuple[LossFn, float | None]


class Selected(NamedTuple):
    """The selected samples of a guide that this rank holds.

    Attributes:
        features: ``(r, ...)``, what the shared module takes. With several ranks these are all rows of this rank.
        cotangents: ``(r, ...)``, the gradient of the guide's loss with respect to the rows' logits; 0 for rows that
            were not selected.
        number: how many samples were selected on all ranks together.
    """

    features: Tensor
    cotangents: Tensor
    number: int


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats: the uncertainty score of the paper (Eq. 6).

    Args:
        logits: ``(B, C)`` with ``C >= 2``.

    Returns:
        ``(B,)`` in [0, log C], float32 or wider.

    Raises:
        ValueError: the logits are not ``(B, C)``, or have a single column.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([0.6931, 0.0012])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), not {tuple(logits.shape)}: pass another `uncertainty`")
    if logits.shape[1] == 1:
        remedy = "for a binary head pass uncertainty=binary_entropy"
        raise ValueError(f"logits have a single column, whose entropy is always 0: {remedy}")
    log_q = torch.log_softmax(logits, dim=1, dtype=_wide(logits))
    # entr(0) is 0, so that a class of probability 0 contributes nothing.
    scores: Tensor = torch.special.entr(log_q.exp()).sum(dim=1)
    return scores


def binary_entropy(logits: Tensor) -> Tensor:
    """Sum of the entropies of independent labels, in nats: the uncertainty score for several labels or a binary head.

    A label with logit z is 1 with probability sigmoid(z). A binary head has one label.

    Args:
        logits: ``(B, L)`` with ``L >= 1``.

    Returns:
        ``(B,)`` in [0, L log 2], float32 or wider.

    Raises:
        ValueError: the logits are not ``(B, L)``, or there is no label.

    Example:
        >>> binary_entropy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([1.3863, 0.6944])
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, L) with L >= 1, not {tuple(logits.shape)}: give one logit a label")
    magnitude = logits.to(_wide(logits)).abs()
    # The rarer outcome is computed from its small probability, and the likelier from its log. Neither is rounded away
    # beside 1, and inf is never multiplied by 0.
    rarer = torch.special.entr(torch.sigmoid(-magnitude))
    scores: Tensor = (rarer - torch.sigmoid(magnitude) * F.logsigmoid(magnitude)).sum(dim=1)
    return scores


def gaussian_entropy(outputs: Tensor) -> Tensor:
    """Differential entropy of the predicted Gaussian, in nats: the uncertainty score for regression.

    The entropy is (log(2 pi e) + log-variance) / 2. The entropy is negative where the variance is small.

    Args:
        outputs: ``(B, 2)``, the mean and the log-variance of every sample.

    Returns:
        ``(B,)``, float32 or wider.

    Raises:
        ValueError: the outputs are not ``(B, 2)``.

    Example:
        >>> gaussian_entropy(torch.tensor([[7.0, 0.0], [7.0, 2.0]]))
        tensor([1.4189, 2.4189])
    """
    if outputs.ndim != 2 or outputs.shape[1] != 2:
        shape = tuple(outputs.shape)
        raise ValueError(f"outputs must be (B, 2), not {shape}: give the mean and the log-variance of each sample")
    log_variance = outputs[:, 1].to(_wide(outputs))
    return (math.log(2 * math.pi * math.e) + log_variance) / 2


def select_uncertain(scores: Tensor, fraction: float) -> Tensor:
    """Positions of the most uncertain samples (Eq. 7).

    Args:
        scores: ``(B,)``, higher is harder. NaN counts as hardest.
        fraction: lambda of the paper, the share to select, in (0, 1].

    Returns:
        ``(k,)`` int64 with ``k = max(1, floor(fraction * B))``, hardest first; ties keep the order of the batch.

    Raises:
        ValueError: ``scores`` is not a non-empty vector, or ``fraction`` is outside (0, 1].

    Example:
        >>> select_uncertain(torch.tensor([0.1, 0.7, 0.3, 0.7]), fraction=0.5)
        tensor([1, 3])
    """
    check_settings(fraction)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (B,) with B >= 1, not {tuple(scores.shape)}: give one score a sample")
    count = max(1, math.floor(fraction * len(scores)))
    return torch.argsort(scores, descending=True, stable=True)[:count]


def guide_gradient(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, *, max_norm: float | None = None
) -> dict[str, Tensor]:
    """Mean gradient of the given samples on the shared module, the paper's g_p (Eq. 8), in one backward pass.

    The module runs in eval mode (running statistics, no dropout) and in its own precision, even inside autocast. Only a
    module that fails without autocast runs under autocast. The call leaves everything unchanged: the module's
    parameters, buffers, attributes and ``.grad``, the features, and the random generators. The module runs on exactly
    the given samples. That matters where a row of logits depends on the other rows.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``, treated as constants.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        max_norm: clip each sample's gradient to this norm before the mean; None does not clip.

    Returns:
        By parameter name, a tensor of the parameter's shape. Frozen parameters are left out.

    Raises:
        TypeError: ``max_norm`` is not a number.
        ValueError: features and target differ in length, the module cannot take the features, the loss cannot take the
            target or is not a scalar, or ``max_norm`` is not positive.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> features, target = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> gradient = guide_gradient(head, features, target, F.cross_entropy)
        >>> {name: tuple(tensor.shape) for name, tensor in gradient.items()}
        {'weight': (3, 4), 'bias': (3,)}
    """
    check_settings(max_norm=max_norm)
    functional.check_lengths(features, target)
    with functional.as_function(shared, features.device) as function:
        trace, cotangents = _traced(function, function.as_input(features), target, loss_fn)
        gradient = _mean_gradient(function, trace, cotangents, len(features), max_norm)
        return dict(zip(function.names, gradient, strict=True))


def uncertain_gradients(
    function: SharedFunction,
    guides: Mapping[str, Evidence],
    choose: Choice,
    settings: Settings,
    rows: SharedRows | None,
) -> tuple[list[list[Tensor]], list[Selected]]:
    """Apply Eqs. 6-8 to each guide: score the samples, select the most uncertain, return their mean gradient.

    With several ranks, the rows of all ranks are scored, and samples are selected among them. The loss is taken over
    the selected rows of all ranks, since class weights may span ranks. Each rank pulls back its own rows. The sum over
    the ranks is the gradient.

    Args:
        function: the shared module.
        guides: by modality.
        choose: from a modality and its samples' logits to the positions of the selected samples.
        settings: the loss and ``max_norm``, as in :func:`guide_gradient`.
        rows: how the batches lie on several ranks; None for a single process.

    Returns:
        Two lists with an entry for each guide: the gradients, each a tensor for each of the function's parameters, and
        the selected samples.

    Raises:
        ValueError: as :func:`guide_gradient`.
    """
    if rows is None:
        each = [_uncertain_gradient(function, name, its, choose, settings) for name, its in guides.items()]
        return [gradient for gradient, _ in each], [samples for _, samples in each]
    loss_fn, max_norm = settings
    traces = {}
    for name, its in guides.items():
        # Not every module runs on 0 rows. On a rank without rows, a row of zeros shows the shape of the logits.
        own = its.features if len(its.features) else its.features.new_zeros(1, *its.features.shape[1:])
        with functional.explaining(f"guide {name!r}"):
            traces[name] = function.trace(function.as_input(own))
    own_logits = {name: trace.logits[: len(guides[name].features)] for name, trace in traces.items()}
    logits, targets = rows.gather(own_logits, {name: its.target for name, its in guides.items()})
    gradients, selected = [], []
    for name, trace in traces.items():
        with functional.explaining(f"guide {name!r}"):
            chosen = choose(name, logits[name])
            cotangents = functional.logit_gradient(logits[name][chosen], targets[name][chosen], loss_fn)
            # Only the device knows which of the chosen rows are ours. Our rows that were not chosen pull back zeros.
            own = rows.own(name, torch.zeros_like(logits[name]).index_copy(0, chosen, cotangents))
            gradients.append(
                _mean_gradient(function, trace, own, len(chosen), max_norm)
                if len(own)
                else [torch.zeros_like(parameter) for parameter in function.parameters]
            )
            selected.append(Selected(trace.features[: len(own)], own, len(chosen)))
    return rows.sum(gradients), selected


def _uncertain_gradient(
    function: SharedFunction, name: str, guide: Evidence, choose: Choice, settings: Settings
) -> tuple[list[Tensor], Selected]:
    loss_fn, max_norm = settings
    with functional.explaining(f"guide {name!r}"):
        features = function.as_input(guide.features)
        chosen = choose(name, function.logits(features))
        trace, cotangents = _traced(function, features[chosen], guide.target[chosen], loss_fn)
        gradient = _mean_gradient(function, trace, cotangents, len(chosen), max_norm)
        return gradient, Selected(trace.features, cotangents, len(chosen))


def hurt_shares(
    function: SharedFunction,
    selected: Sequence[Selected],
    directions: Sequence[Mapping[str, Tensor]],
    rows: SharedRows | None,
) -> Tensor:
    """Share of each guide's selected samples whose gradient has a negative inner product with a direction.

    A product that is 0 up to rounding does not count as negative. The scale of rounding is the sample's product with
    the first direction.

    Args:
        function: the shared module, with the weights at which the samples were selected.
        selected: as :func:`uncertain_gradients` gave them.
        directions: whole tensors by parameter name. A parameter without a tensor has direction 0.
        rows: how the batches lie on several ranks; None for a single process.

    Returns:
        ``(directions, guides)``, equal on all ranks.
    """
    named = list(zip(function.names, function.constants, strict=True))
    whole = [tuple(its[name].to(x) if name in its else torch.zeros_like(x) for name, x in named) for its in directions]
    hurt = []
    for features, cotangents, _ in selected:
        products = cotangents.new_zeros(len(whole), 0)  # a rank may hold no row of a guide
        if len(features):
            trace = function.trace(features)
            products = torch.stack([pulled_back_products(function, trace, cotangents, its) for its in whole])
        # Surgery may bring a product to 0. Rounding then moves the product to either side of 0.
        rounding = torch.finfo(cotangents.dtype).eps ** 0.5 * products[0].abs()
        hurt.append((products < -rounding).sum(dim=1, dtype=torch.float32))
    counts = torch.stack(hurt, dim=1)
    if rows is not None:
        ((counts,),) = rows.sum([[counts]])
    return torch.stack([its / each.number for its, each in zip(counts.unbind(1), selected, strict=True)], dim=1)


def check_settings(fraction: float | Mapping[str, float] = 1, max_norm: float | None = None) -> None:
    """Raise unless fractions are numbers in (0, 1], and ``max_norm`` is None or positive."""
    for share in fraction.values() if isinstance(fraction, Mapping) else [fraction]:
        check_number("fraction", share, lambda x: 0 < x <= 1, "a number in (0, 1]", "in (0, 1]")
    allowed = "positive, or None for no clipping"
    check_number("max_norm", 1 if max_norm is None else max_norm, lambda x: x > 0, "a number or None", allowed)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _traced(function: SharedFunction, features: Tensor, target: Tensor, loss_fn: LossFn) -> tuple[Trace, Tensor]:
    trace = function.trace(features)
    return trace, functional.logit_gradient(trace.logits, functional.as_constant(target), loss_fn)


def _mean_gradient(
    function: SharedFunction, trace: Trace, cotangents: Tensor, count: int, max_norm: float | None
) -> list[Tensor]:
    """The given rows' part of the mean over ``count`` samples."""
    if max_norm is not None:
        # Clipping a sample's gradient scales the sample's cotangent, so one backward pass still gives the mean.
        norms = count * pulled_back_norms(function, trace, cotangents)
        scale = (max_norm / norms).clamp(max=1).to(cotangents.dtype)
        cotangents = cotangents * scale.view(-1, *[1] * (cotangents.ndim - 1))
    return trace.pull(cotangents)
