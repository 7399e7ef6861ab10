"""Fusion of the modalities' outputs into one prediction, for classes, independent labels and Gaussians."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Outputs = Mapping[str, Tensor] | Sequence[Tensor]


def fuse_logits(logits: Outputs, *, log_prior: Tensor | None = None, log_odds: Tensor | None = None) -> Tensor:
    """One prediction from the logits of several modalities.

    There are three ways:

    - By default the mean of the logits (Eq. 10 of the paper).
    - With ``log_prior``, the product of experts for classes, ``sum_m log softmax(z_m) - (M - 1) log_prior``. Each of
      the M experts has counted the prior once, so M - 1 priors are taken out. The product is exact where the modalities
      are independent given the class.
    - With ``log_odds``, the product of experts for every independent label, ``sum_m z_m - (M - 1) log_odds``.

    Args:
        logits: by modality, or in a sequence: ``(B, C)`` each, for C classes or C independent labels.
        log_prior: ``(C,)`` log frequencies of the classes in training; None for the mean.
        log_odds: ``(L,)`` log odds of the L = C labels in training, ``log(p / (1 - p))`` for a label of frequency p;
            None for the mean.

    Returns:
        ``(B, C)`` logits.

    Raises:
        ValueError: there are no logits, their shapes differ, ``log_prior`` or ``log_odds`` differs in length from their
            columns, or both are given.

    Example:
        >>> image, table = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> fuse_logits({"image": image, "table": table})
        tensor([[1.0000, 0.5000]])
        >>> labels = [torch.tensor([[2.0]]), torch.tensor([[1.0]])]
        >>> fuse_logits(labels, log_odds=torch.tensor([-0.5]))
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

    The fused precision (1 / variance) is the sum of the modalities' precisions. The fused mean is the mean of the
    modalities' means, weighted by the precisions. All precisions stay in logarithms, so none overflows or underflows.

    Args:
        outputs: by modality, or in a sequence: ``(B, 2)`` each, the mean and the log-variance of every sample.

    Returns:
        ``(B, 2)``, the mean and the log-variance of the product.

    Raises:
        ValueError: there are no outputs, their shapes differ, or their shapes are not ``(B, 2)``.

    Example:
        >>> image, table = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> fuse_gaussians({"image": image, "table": table})
        tensor([[ 2.0000, -0.6931]])
    """
    means, log_variances = _stacked(outputs, "outputs", 2).unbind(dim=2)
    mean = (log_variances.neg().softmax(dim=0) * means).sum(dim=0)
    return torch.stack([mean, -log_variances.neg().logsumexp(dim=0)], dim=1)


class _Calibrated(nn.Module):
    """The base of the calibrated fusions: experts by name, and the fit of the parameters around their starts."""

    bias: nn.Parameter
    _noun = "logits"

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be one or more different names, not {self.modalities}")

    @property
    def _starts(self) -> dict[str, float]:
        """The value at which each parameter starts. The value is also the mean of the parameter's prior."""
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
        """The experts' outputs in float64, as constants, after a check that the target fits the outputs."""
        stacked = self._stacked(outputs).detach().double()
        expected = (stacked.shape[1], *columns)
        if target.shape != expected or len(target) == 0:
            raise ValueError(f"target must be {expected} with at least one sample, not {tuple(target.shape)}")
        if not stacked.isfinite().all():
            raise ValueError(f"{self._noun} must be finite to be calibrated")
        return stacked

    def _fit(self, stacked: Tensor, loss: Callable[[Tensor], Tensor], max_iter: int) -> Self:
        """Minimise the loss of the fused outputs by L-BFGS, with a unit Gaussian prior around the start."""
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
        # A loss that is infinite at the start or during a line search may end in NaN.
        if not objective().isfinite():
            raise ValueError(f"{self._noun} are too far from the target for a finite loss: scale or bound them")
        self.load_state_dict(parameters)
        return self


class CalibratedFusion(_Calibrated):
    """A weighted sum of the modalities' logits plus a bias for every class, fitted on validation data.

    Before :meth:`fit` the module gives the mean of the logits. :meth:`fit` maximises the posterior, with a unit
    Gaussian prior around that start. The prior keeps the bias moderate for a class that is rare in the validation data.
    The program is convex.

    Args:
        modalities: the modalities' names, in the order of the logits where these come as a sequence.
        classes: number of classes C.

    Raises:
        ValueError: there is no modality, a name appears twice, or there are fewer than two classes.

    Example:
        >>> target = torch.tensor([0, 1, 0, 1])
        >>> image = 4 * F.one_hot(target, 2).float()
        >>> table = torch.zeros(4, 2)
        >>> fusion = CalibratedFusion(["image", "table"], classes=2)
        >>> fusion = fusion.fit([image, table], target)
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
        """Fit the weights and biases to held-out logits by L-BFGS. An earlier fit is forgotten.

        Args:
            logits: by modality or in order, ``(N, C)`` each, treated as constants.
            target: ``(N,)`` class indices.
            weight: ``(C,)`` weights of the classes in the cross-entropy, for classes of unequal frequency. A class of
                weight 2 counts as if each of its samples were there twice. None weighs all classes alike.
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
    """A weighted sum of the modalities' logits plus a bias for every independent label, fitted on validation data.

    Each label has weights and a bias of its own. Before :meth:`fit` the module gives the mean of the logits.
    :meth:`fit` maximises the posterior, with a unit Gaussian prior around that start. The program is convex.

    Args:
        modalities: the modalities' names, in the order of the logits where these come as a sequence.
        labels: number of labels L.

    Raises:
        ValueError: there is no modality, a name appears twice, or there is no label.

    Example:
        >>> target = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> image = 4 * target - 2
        >>> table = torch.zeros(4, 2)
        >>> fusion = CalibratedLabelFusion(["image", "table"], labels=2)
        >>> fusion = fusion.fit([image, table], target)
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
        """Fit the weights and biases to held-out logits by L-BFGS. An earlier fit is forgotten.

        Args:
            logits: by modality or in order, ``(N, L)`` each, treated as constants.
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

    Each modality has a log-weight, and the modality's precision is multiplied by ``exp(log_weight)``. Before
    :meth:`fit`, log-weights and bias are 0, and the module gives :func:`fuse_gaussians`. :meth:`fit` maximises the
    posterior, with a unit Gaussian prior around that start. The weights scale the fused variance too, which calibrates
    modalities that are too sure of themselves. The bias has the unit of the target. Standardise the target first, as
    the prior expects a bias of about 1 or less.

    Args:
        modalities: the modalities' names, in the order of the outputs where these come as a sequence.

    Raises:
        ValueError: there is no modality, or a name appears twice.

    Example:
        >>> target = torch.tensor([1.0, -1.0, 2.0, 0.0])
        >>> errors = torch.tensor([1.0, -1.0, -1.0, 1.0])  # above exp(-3 / 2)
        >>> image = torch.stack([target + errors, torch.full((4,), -3.0)], dim=1)
        >>> fusion = CalibratedGaussianFusion(["image"]).fit([image], target)
        >>> bool((fusion([image])[:, 1] > image[:, 1]).all())
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
        """Fit the log-weights and the bias to held-out outputs by L-BFGS. An earlier fit is forgotten.

        Args:
            outputs: by modality or in order, ``(N, 2)`` each, mean and log-variance, treated as constants.
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
        raise ValueError(f"{name} must be ({length},), one for each {unit}, not {tuple(vector.shape)}")


def _stacked(outputs: Outputs, noun: str = "logits", columns: int | None = None) -> Tensor:
    """The modalities' outputs as ``(M, B, C)``."""
    tensors = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
    shapes = [tuple(tensor.shape) for tensor in tensors]  # not hashed, as the sizes of an exported program have no hash
    same = bool(shapes) and len(shapes[0]) == 2 and all(shape == shapes[0] for shape in shapes)
    if not same or columns not in (None, shapes[0][1]):
        expected = f"(B, {columns or 'C'})"
        raise ValueError(f"{noun} must be one or more {expected} tensors of the same shape, not {sorted(set(shapes))}")
    return torch.stack(tensors)
