"""The modalities' logits into one prediction: mean, product of experts, calibrated sum."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Logits = Mapping[str, Tensor] | Sequence[Tensor]


def fuse_logits(logits: Logits, *, log_prior: Tensor | None = None) -> Tensor:
    """One prediction from the logits of several modalities.

    Without a prior the mean of the logits (Eq. 10 of the paper). With the log frequencies of the classes in training,
    the product of experts, ``sum_m log softmax(z_m) - (M - 1) log_prior``: right where the modalities are independent
    given the class, since each expert has counted the prior once.

    Args:
        logits: by modality, or in a sequence: ``(B, C)`` each.
        log_prior: ``(C,)`` log frequencies of the classes; None for the mean.

    Returns:
        ``(B, C)`` logits.

    Raises:
        ValueError: there are no logits, their shapes differ, or ``log_prior`` is not ``(C,)``.

    Example:
        >>> fuse_logits({"image": torch.tensor([[2.0, 0.0]]), "table": torch.tensor([[0.0, 1.0]])})
        tensor([[1.0000, 0.5000]])
    """
    stacked = _stacked(logits.values() if isinstance(logits, Mapping) else logits)
    if log_prior is None:
        return stacked.mean(dim=0)
    if log_prior.shape != stacked.shape[2:]:
        raise ValueError(f"log_prior must be ({stacked.shape[2]},), one a class, not {tuple(log_prior.shape)}")
    return stacked.log_softmax(dim=2).sum(dim=0) - (len(stacked) - 1) * log_prior


class CalibratedFusion(nn.Module):
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
        super().__init__()
        self.modalities = tuple(modalities)
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be one or more different names, not {self.modalities}")
        if classes < 2:
            raise ValueError(f"classes must be at least 2, not {classes}")
        self.weight = nn.Parameter(torch.full((len(self.modalities),), 1 / len(self.modalities)))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, logits: Logits) -> Tensor:
        """The fused logits ``(B, C)`` of the modalities' ``(B, C)``.

        Raises:
            ValueError: a modality is missing, or a shape is not ``(B, C)``.
        """
        stacked = self._stacked(logits)
        dtype = torch.promote_types(stacked.dtype, self.weight.dtype)
        return torch.einsum("m,mbc->bc", self.weight.to(dtype), stacked.to(dtype)) + self.bias

    def fit(self, logits: Logits, target: Tensor, *, max_iter: int = 200) -> Self:
        """Fit weights and biases to held-out logits by L-BFGS; the module's earlier fit is forgotten.

        Args:
            logits: by modality or in order, ``(N, C)`` each; treated as constants.
            target: ``(N,)`` class indices.
            max_iter: most iterations of L-BFGS.

        Returns:
            The module itself.

        Raises:
            ValueError: shapes do not match, there is no sample, or a logit is not finite.
        """
        stacked = self._stacked(logits).detach().double()
        if target.shape != stacked.shape[1:2] or len(target) == 0:
            raise ValueError(
                f"target must be ({stacked.shape[1]},) with at least one sample, not {tuple(target.shape)}"
            )
        if not stacked.isfinite().all():
            raise ValueError("logits must be finite to be calibrated")
        twin = CalibratedFusion(self.modalities, len(self.bias)).to(stacked)
        optimizer = torch.optim.LBFGS(twin.parameters(), max_iter=max_iter, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            deviation = (twin.weight - 1 / len(self.modalities)).square().sum() + twin.bias.square().sum()
            loss = F.cross_entropy(twin(list(stacked)), target) + deviation / 2 / len(target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.load_state_dict(twin.state_dict())
        return self

    def _stacked(self, logits: Logits) -> Tensor:
        if isinstance(logits, Mapping):
            if set(logits) != set(self.modalities):
                raise ValueError(f"logits must be given for {self.modalities}, not {tuple(logits)}")
            logits = [logits[modality] for modality in self.modalities]
        stacked = _stacked(logits)
        expected = (len(self.modalities), len(self.bias))
        if (len(stacked), stacked.shape[2]) != expected:
            raise ValueError(f"logits must be {expected[0]} tensors (B, {expected[1]}), not {tuple(stacked.shape)}")
        return stacked


def _stacked(logits: Iterable[Tensor]) -> Tensor:
    """The modalities' logits as ``(M, B, C)``."""
    tensors = list(logits)
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1 or len(min(shapes)) != 2:
        raise ValueError(f"logits must be one or more (B, C) tensors of the same shape, not {sorted(shapes)}")
    return torch.stack(tensors)
