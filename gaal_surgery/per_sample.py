"""The shared module as a pure function: its gradients for a batch and for every sample, by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

LossFn = Callable[[Tensor, Tensor], Tensor]


def per_sample_gradients(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """Gradient of every sample's loss with respect to the trainable parameters of ``shared``.

    Sample ``i`` gets ``k`` times its share of the gradient of ``loss_fn`` over the ``k`` samples, so that the mean over
    samples is the gradient of ``loss_fn``, class weights and ``ignore_index`` included. The module runs in eval mode
    and is left unchanged.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``, what the module is called on.
        target: ``(k, ...)``, what ``loss_fn`` takes.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        chunk_size: samples differentiated at a time; bounds the memory, None takes all at once.

    Returns:
        By parameter name, ``(k, *shape)``. Frozen parameters are left out.

    Raises:
        ValueError: features and target differ in length, the module cannot take the features, or the loss cannot take
            the target or is not a scalar.
    """
    with frozen(shared, features):
        features = as_input(shared, features, target)
        cotangents = len(features) * logit_gradient(evaluate(shared, features), target, loss_fn)
        return _pull_back_each(shared, features, cotangents, chunk_size)


def per_sample_norms(shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
    """Euclidean norm of every sample's gradient over all trainable parameters of ``shared``.

    For a ``Linear`` head on ``(k, D)`` features the gradient of sample ``i`` is the outer product of its logit
    gradient ``d_i`` and its features ``u_i``, whence ``|d_i| * sqrt(|u_i|^2 + 1)`` without forming it (Goodfellow,
    2015, "Efficient per-example gradient computations"). Any other head goes through :func:`per_sample_gradients`.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.

    Returns:
        ``(k,)``, float32 or wider.

    Raises:
        ValueError: as :func:`per_sample_gradients`.
    """
    with frozen(shared, features):
        features = as_input(shared, features, target)
        cotangents = len(features) * logit_gradient(evaluate(shared, features), target, loss_fn)
        return pulled_back_norms(shared, features, cotangents)


@contextmanager
def frozen(shared: nn.Module, features: Tensor) -> Iterator[None]:
    """Eval mode for every submodule and no autocast; the flags come back as they were, also after an error."""
    modes = [(module, module.training) for module in shared.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.autocast(features.device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def as_input(shared: nn.Module, features: Tensor, target: Tensor) -> Tensor:
    """The features, detached and in the precision of the module: encoders under autocast hand over half precision."""
    check_lengths(features, target)
    features = features.detach()
    if features.is_floating_point():
        features = features.to(next((parameter.dtype for parameter in shared.parameters()), features.dtype))
    # Tensors made under inference_mode cannot be saved for a backward pass; compiled code has none of them.
    return features.clone() if not torch.compiler.is_compiling() and features.is_inference() else features


def check_lengths(features: Tensor, target: Tensor) -> None:
    """Raise unless there is one target for every row of features."""
    if features.ndim == 0 or target.ndim == 0 or len(features) != len(target):
        raise ValueError(
            f"features {tuple(features.shape)} and target {tuple(target.shape)} must have the same length: "
            "pass one target for every row of features"
        )


def evaluate(shared: nn.Module, features: Tensor) -> Tensor:
    """The logits of ``shared``, one row for every sample; no graph is kept."""
    with torch.no_grad():
        try:
            logits = functional_call(shared, _buffers(shared), (features,))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"features of shape {tuple(features.shape)} cannot be taken by shared ({type(shared).__name__}); "
                f"pass what the module is called on in training: {error}"
            ) from error
    if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != len(features):
        raise ValueError(f"shared must return one row of logits for each of the {len(features)} samples")
    return logits


def logit_gradient(logits: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
    """Gradient of the batch's loss with respect to the logits; row ``i`` is sample ``i``'s share of it."""

    def loss(logits: Tensor) -> Tensor:
        try:
            value = loss_fn(logits, target)
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"target of shape {tuple(target.shape)}, {target.dtype}, cannot be taken by loss_fn with logits "
                f"{tuple(logits.shape)}; pass what the loss is called on in training: {error}"
            ) from error
        if value.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, not {tuple(value.shape)}: use its mean reduction")
        return value

    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or target.is_inference():
        gradient: Tensor = grad(loss)(logits)
        return gradient
    # The same three times as fast, which counts for small heads, but not in the modes above.
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


def pull_back(shared: nn.Module, features: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """Gradient of ``sum(logits * cotangents)`` with respect to the trainable parameters: one backward pass."""
    if _is_plain_linear(shared, features):
        closed_form = {"weight": lambda: cotangents.T @ features, "bias": lambda: cotangents.sum(0)}
        return {name: closed_form[name]() for name in trainable(shared)}

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(shared, (parameters, _buffers(shared)), (features,))
        return logits

    pull = vjp(forward, {name: parameter.detach() for name, parameter in trainable(shared).items()})[1]
    gradient: dict[str, Tensor] = pull(cotangents)[0]
    return gradient


def pulled_back_norms(shared: nn.Module, features: Tensor, cotangents: Tensor) -> Tensor:
    """Norm of each sample's pulled-back cotangent, ``(k,)``; 0 where every parameter is frozen."""
    if not trainable(shared):
        return 0 * _row_norms(cotangents)
    if _is_plain_linear(shared, features):
        # The gradient is an outer product of the cotangent with the features, and with 1 for the bias.
        inputs = {"weight": _row_norms(features), "bias": _row_norms(features.new_ones(len(features), 1))}
        return _row_norms(cotangents) * _row_norms(torch.stack([inputs[name] for name in trainable(shared)], dim=1))
    gradients = _pull_back_each(shared, features, cotangents).values()
    return _row_norms(torch.stack([_row_norms(gradient) for gradient in gradients], dim=1))


def trainable(shared: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name; a tied parameter appears once."""
    return {name: parameter for name, parameter in shared.named_parameters() if parameter.requires_grad}


def _pull_back_each(
    shared: nn.Module, features: Tensor, cotangents: Tensor, chunk_size: int | None = None
) -> dict[str, Tensor]:
    def weighted_logit(parameters: dict[str, Tensor], feature: Tensor, cotangent: Tensor) -> Tensor:
        logits = functional_call(shared, (parameters, _buffers(shared)), (feature.unsqueeze(0),))
        value: Tensor = (logits.squeeze(0) * cotangent).sum()
        return value

    parameters = {name: parameter.detach() for name, parameter in trainable(shared).items()}
    each = vmap(grad(weighted_logit), in_dims=(None, 0, 0), chunk_size=chunk_size)
    gradients: dict[str, Tensor] = each(parameters, features, cotangents)
    return gradients


def _row_norms(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=dtype)
    return norms


def _buffers(shared: nn.Module) -> dict[str, Tensor]:
    # Copies, so that a module that counts or averages even in eval mode leaves no trace; torch.func takes such a module
    # only where they are made inside the function it transforms.
    return {name: buffer.clone() for name, buffer in shared.named_buffers()}


def _is_plain_linear(shared: nn.Module, features: Tensor) -> bool:
    # A subclass, a parametrization (which makes one) or a hook may compute something else.
    hooked = shared._forward_hooks or shared._forward_pre_hooks
    return type(shared) is nn.Linear and not hooked and features.ndim == 2
