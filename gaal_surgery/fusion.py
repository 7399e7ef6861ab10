"""The modalities' outputs into one prediction: mean, product of experts, calibrated sum; classes, labels, Gaussians."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Outputs = Mapping[str, Tensor] | Sequence[Tensor]


def fuse_logits(logits: Outputs, *, log_prior: Tensor | None = None, log_odds: Tensor | None = None) -> Tensor:
    """One prediction from the logits of several modalities.

    Without a prior the mean of the logits (Eq. 10 of the paper). With the log frequencies of the classes in training,
    the product of experts, ``sum_m log softmax(z_m) - (M - 1) log_prior``: right where the modalities are independent
    given the class, since each expert has counted the prior once. With the log odds of independent labels in training,
    the product of experts of every label, ``sum_m z_m - (M - 1) log_odds``.

    Args:
        logits: by modality, or in a sequence: ``(B, C)`` each, for C classes or for as many independent labels.
        log_prior: ``(C,)`` log frequencies of the classes; None for the mean.
        log_odds: ``(L,)`` log odds of the labels, ``log(p / (1 - p))`` of a label with frequency p; None for the mean.

    Returns:
        ``(B, C)`` logits.

    Raises:
        ValueError: there are no logits, their shapes differ, ``log_prior`` or ``log_odds`` has another length than
            their columns, or both are given.

    Example:
        >>> fuse_logits({"image": torch.tensor([[2.0, 0.0]]), "table": torch.tensor([[0.0, 1.0]])})
        tensor([[1.0000, 0.5000]])
        >>> fuse_logits([torch.tensor([[2.0]]), torch.tensor([[1.0]])], log_odds=torch.tensor([-0.5]))
        tensor([[3.5000]])
    """
    stacked = _stacked(logits)
    if log_prior is not None and log_odds is not None:
        raise ValueError("log_prior is for classes and log_odds for independent labels: give one of them")
    if log_prior is not None:
        _check_length("log_prior", log_prior, stacked.shape[2], "class")
        return stacked.log_softmax(dim=2).sum(dim=0) - (len(stacked) - 1) * log_prior
    if log_odds is not None:
        _check_length("log_odds", log_odds, stacked.shape[2], "label")
        return stacked.sum(dim=0) - (len(stacked) - 1) * log_odds
    return stacked.mean(dim=0)


def fuse_gaussians(outputs: Outputs) -> Tensor:
    """The normalised product of the modalities' Gaussians.

    The precision is the sum of the precisions. The mean is the mean of the means, weighted by the precisions. Both are
    computed from the log-variances without leaving the logarithm, so that no precision overflows or underflows.

    Args:
        outputs: by modality, or in a sequence: ``(B, 2)`` each, the mean and the log-variance of every sample.

    Returns:
        ``(B, 2)``, the mean and the log-variance of the product.

    Raises:
        ValueError: there are no outputs, their shapes differ, or are not ``(B, 2)``.

    Example:
        >>> fuse_gaussians({"image": torch.tensor([[0.0, 0.0]]), "table": torch.tensor([[4.0, 0.0]])})
        tensor([[ 2.0000, -0.6931]])
    """
    means, log_variances = _stacked(outputs, "outputs", 2).unbind(dim=2)
    mean = (log_variances.neg().softmax(dim=0) * means).sum(dim=0)
    return torch.stack([mean, -log_variances.neg().logsumexp(dim=0)], dim=1)


class _Calibrated(nn.Module):
    """What the calibrated fusions share: experts by name, and the fit of the parameters around their starts."""

    bias: nn.Parameter
    _noun = "logits"

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be one or more different names, not {self.modalities}")

    @property
    def _starts(self) -> dict[str, float]:
        """Where each parameter starts, and its prior has its mean."""
        return {"weight": 1 / len(self.modalities), "bias": 0.0}

    @property
    def _columns(self) -> int:
        return len(self.bias)

    def _start(self, name: str, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, self._starts[name]))

    def _stacked(self, outputs: Outputs) -> Tensor:
        """The experts' outputs as ``(M, B, columns)``, in the order of the modalities."""
        if isinstance(outputs, Mapping):
            if set(outputs) != set(self.modalities):
                raise ValueError(f"{self._noun} must be given for {self.modalities}, not {tuple(outputs)}")
            outputs = [outputs[modality] for modality in self.modalities]
        stacked = _stacked(outputs, self._noun)
        count, columns = len(self.modalities), self._columns
        if (len(stacked), stacked.shape[2]) != (count, columns):
            raise ValueError(f"{self._noun} must be {count} tensors (B, {columns}), not {tuple(stacked.shape)}")
        return stacked.to(torch.promote_types(stacked.dtype, self.bias.dtype))

    def _held_out(self, outputs: Outputs, target: Tensor, *columns: int) -> Tensor:
        """The experts' outputs in float64, as constants, once the target is known to fit them."""
        stacked = self._stacked(outputs).detach().double()
        expected = (stacked.shape[1], *columns)
        if target.shape != expected or len(target) == 0:
            raise ValueError(f"target must be {expected} with at least one sample, not {tuple(target.shape)}")
        if not stacked.isfinite().all():
            raise ValueError(f"{self._noun} must be finite to be calibrated")
        return stacked

    def _fit(self, stacked: Tensor, loss: Callable[[Tensor], Tensor], max_iter: int) -> Self:
        """Minimise the loss of the fused outputs, with the prior of a unit Gaussian around the start, by L-BFGS."""
        starts = self._starts
        parameters = {
            name: torch.full(own.shape, starts[name]).to(stacked).requires_grad_()
            for name, own in self.named_parameters()
        }
        optimizer = torch.optim.LBFGS(parameters.values(), max_iter=max_iter, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            deviation = sum((its - starts[name]).square().sum() for name, its in parameters.items())
            return loss(functional_call(self, parameters, (list(stacked),))) + deviation / 2 / stacked.shape[1]

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        # An infinite loss, at the start or where a line search goes, may end in NaN.
        if not objective().isfinite():
            raise ValueError(f"{self._noun} are too far from the target for a finite loss: scale or bound them")
        self.load_state_dict(parameters)
        return self


class CalibratedFusion(_Calibrated):
    """A weighted sum of the modalities' logits plus a bias for every class, fitted on validation data.

    Starts as the mean. :meth:`fit` maximises the posterior with a unit Gaussian prior around that start, so that a
    class rare in the validation data keeps a moderate bias; the program is convex.

    Args:
        modalities: their names, in the order that a sequence of logits has.
        classes: number of classes C.

    Raises:
        ValueError: no modality, a name twice, or fewer than two classes.

    Example:
        >>> target = torch.tensor([0, 1, 0, 1])
        >>> image = 4 * F.one_hot(target, 2).float()
        >>> table = torch.zeros(4, 2)
        >>> fusion = CalibratedFusion(["image", "table"], classes=2).fit([image, table], target)
        >>> fusion({"image": image, "table": table}).argmax(dim=1)
        tensor([0, 1, 0, 1])
    """

    def __init__(self, modalities: Sequence[str], classes: int) -> None:
        super().__init__(modalities)
        if classes < 2:
            raise ValueError(f"classes must be at least 2, not {classes}")
        self.weight = self._start("weight", len(self.modalities))
        self.bias = self._start("bias", classes)

    def forward(self, logits: Outputs) -> Tensor:
        """The fused logits ``(B, C)`` of the modalities' ``(B, C)``.

        Raises:
            ValueError: a modality is missing, or a shape is not ``(B, C)``.
        """
        stacked = self._stacked(logits)
        return torch.einsum("m,mbc->bc", self.weight.to(stacked), stacked) + self.bias

    def fit(self, logits: Outputs, target: Tensor, *, weight: Tensor | None = None, max_iter: int = 200) -> Self:
        """Fit weights and biases to held-out logits by L-BFGS; the module's earlier fit is forgotten.

        Args:
            logits: by modality or in order, ``(N, C)`` each; treated as constants.
            target: ``(N,)`` class indices.
            weight: ``(C,)`` of the classes in the cross-entropy, as for classes of unequal frequency. A class of weight
                2 counts as if each of its samples were there twice. None weighs all alike.
            max_iter: most iterations of L-BFGS.

        Returns:
            The module itself.

        Raises:
            ValueError: shapes do not match, there is no sample, a logit is not finite, or a class weight is negative or
                not finite.
        """
        stacked = self._held_out(logits, target)
        if weight is None:
            return self._fit(stacked, lambda fused: F.cross_entropy(fused, target), max_iter)
        _check_length("weight", weight, len(self.bias), "class")
        if not (weight.isfinite() & (weight >= 0)).all():
            raise ValueError("weight must be finite and not negative")
        weights = weight.detach().to(stacked)
        return self._fit(
            stacked,
            lambda fused: F.cross_entropy(fused, target, weights, reduction="sum") / len(target),
            max_iter,
        )


class CalibratedLabelFusion(_Calibrated):
    """For every independent label a weighted sum of the modalities' logits plus a bias, fitted on validation data.

    Starts as the mean. :meth:`fit` maximises the posterior with a unit Gaussian prior around that start; the program is
    convex.

    Args:
        modalities: their names, in the order that a sequence of logits has.
        labels: number of labels L.

    Raises:
        ValueError: no modality, a name twice, or no label.

    Example:
        >>> target = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> image = 4 * target - 2
        >>> table = torch.zeros(4, 2)
        >>> fusion = CalibratedLabelFusion(["image", "table"], labels=2).fit([image, table], target)
        >>> torch.equal(fusion({"image": image, "table": table}) > 0, target.bool())
        True
    """

    def __init__(self, modalities: Sequence[str], labels: int) -> None:
        super().__init__(modalities)
        if labels < 1:
            raise ValueError(f"labels must be at least 1, not {labels}")
        self.weight = self._start("weight", len(self.modalities), labels)
        self.bias = self._start("bias", labels)

    def forward(self, logits: Outputs) -> Tensor:
        """The fused logits ``(B, L)`` of the modalities' ``(B, L)``.

        Raises:
            ValueError: a modality is missing, or a shape is not ``(B, L)``.
        """
        stacked = self._stacked(logits)
        return torch.einsum("ml,mbl->bl", self.weight.to(stacked), stacked) + self.bias

    def fit(self, logits: Outputs, target: Tensor, *, max_iter: int = 200) -> Self:
        """Fit weights and biases to held-out logits by L-BFGS; the module's earlier fit is forgotten.

        Args:
            logits: by modality or in order, ``(N, L)`` each; treated as constants.
            target: ``(N, L)`` of bool, or of numbers in [0, 1]: the probability of each label.
            max_iter: most iterations of L-BFGS.

        Returns:
            The module itself.

        Raises:
            ValueError: shapes do not match, there is no sample, a logit is not finite, or the target is not in [0, 1].
        """
        stacked = self._held_out(logits, target, len(self.bias))
        labels = target.detach().to(stacked)
        if not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError("target must lie in [0, 1]: give the probability of each label")
        return self._fit(
            stacked,
            lambda fused: F.binary_cross_entropy_with_logits(fused, labels, reduction="sum") / len(labels),
            max_iter,
        )


class CalibratedGaussianFusion(_Calibrated):
    """A weighted product of the modalities' Gaussians plus a bias on the mean, fitted on validation data.

    Every expert's precision is multiplied by ``exp(log_weight)`` of its own. Starts as :func:`fuse_gaussians`, with
    log-weights and bias 0. The weights scale the fused variance too, so that experts too sure of themselves are
    calibrated. :meth:`fit` maximises the posterior with a unit Gaussian prior around that start. The bias has the unit
    of the target. Standardise the target first, as the prior expects a bias of about 1 or less.

    Args:
        modalities: their names, in the order that a sequence of outputs has.

    Raises:
        ValueError: no modality, or a name twice.

    Example:
        >>> target = torch.tensor([1.0, -1.0, 2.0, 0.0])
        >>> image = torch.stack([target + torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.full((4,), -3.0)], dim=1)
        >>> fusion = CalibratedGaussianFusion(["image"]).fit([image], target)
        >>> bool((fusion([image])[:, 1] > image[:, 1]).all())  # the errors are larger than the stated variance
        True
    """

    _noun = "outputs"
    _columns = 2

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__(modalities)
        self.log_weight = self._start("log_weight", len(self.modalities))
        self.bias = self._start("bias")

    @property
    def _starts(self) -> dict[str, float]:
        return {"log_weight": 0.0, "bias": 0.0}

    def forward(self, outputs: Outputs) -> Tensor:
        """The mean and log-variance ``(B, 2)`` of the modalities' ``(B, 2)``.

        Raises:
            ValueError: a modality is missing, or a shape is not ``(B, 2)``.
        """
        means, log_variances = self._stacked(outputs).unbind(dim=2)
        weighted = torch.stack([means, log_variances - self.log_weight[:, None]], dim=2)
        mean, log_variance = fuse_gaussians(list(weighted)).unbind(dim=1)
        return torch.stack([mean + self.bias, log_variance], dim=1)

    def fit(self, outputs: Outputs, target: Tensor, *, max_iter: int = 200) -> Self:
        """Fit log-weights and bias to held-out outputs by L-BFGS; the module's earlier fit is forgotten.

        Args:
            outputs: by modality or in order, ``(N, 2)`` each, mean and log-variance; treated as constants.
            target: ``(N,)`` values.
            max_iter: most iterations of L-BFGS.

        Returns:
            The module itself.

        Raises:
            ValueError: shapes do not match, there is no sample, or an output, a target or the loss is not finite.
        """
        stacked = self._held_out(outputs, target)
        values = target.detach().to(stacked)
        if not values.isfinite().all():
            raise ValueError("target must be finite")

        def negative_log_likelihood(fused: Tensor) -> Tensor:
            mean, log_variance = fused.unbind(dim=1)
            return (log_variance + (values - mean).square() * log_variance.neg().exp()).mean() / 2

        return self._fit(stacked, negative_log_likelihood, max_iter)


def _check_length(name: str, vector: Tensor, length: int, unit: str) -> None:
    if vector.shape != (length,):
        raise ValueError(f"{name} must be ({length},), one a {unit}, not {tuple(vector.shape)}")


def _stacked(outputs: Outputs, noun: str = "logits", columns: int | None = None) -> Tensor:
    """The modalities' outputs as ``(M, B, C)``."""
    tensors = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
    shapes = [tuple(tensor.shape) for tensor in tensors]  # never hashed, as an exported size has no hash
    same = bool(shapes) and len(shapes[0]) == 2 and all(shape == shapes[0] for shape in shapes)
    if not same or columns not in (None, shapes[0][1]):
        expected = f"(B, {columns or 'C'})"
        raise ValueError(f"{noun} must be one or more {expected} tensors of the same shape, not {sorted(set(shapes))}")
    return torch.stack(tensors)
