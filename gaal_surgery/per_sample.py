"""Gradients of single samples, their norms, and their products with a direction, by ``torch.func`` where possible."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import gaal_surgery.functional as functional
from gaal_surgery.functional import LossFn, SharedFunction, Trace
from gaal_surgery.surgery import on_host

Measure = Callable[[list[Tensor]], list[Tensor]]
# The samples' gradients that are formed at a time hold at most so many numbers.
_MOST_NUMBERS = 2**24


def per_sample_gradients(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    """Gradient of every sample's loss with respect to the trainable parameters of ``shared``.

    A sample's gradient is ``k`` times the sample's share of the gradient of ``loss_fn`` over the ``k`` samples. The
    mean over the samples is therefore the gradient of ``loss_fn``, class weights and ``ignore_index`` included. The
    module runs in eval mode and is left unchanged.

    ``vmap`` runs the module on each sample alone. For a module that ``vmap`` cannot follow, the module runs once on all
    samples, and one backward pass for each sample follows.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``, what the module is called on.
        target: ``(k, ...)``, what ``loss_fn`` takes.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        chunk_size: how many samples ``vmap`` takes at a time, to bound the memory; None takes all samples at once.

    Returns:
        By parameter name, ``(k, *shape)``. Frozen parameters are left out.

    Raises:
        ValueError: features and target differ in length, the module cannot take the features, or the loss cannot take
            the target or is not a scalar.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> features, target = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> each = per_sample_gradients(head, features, target, F.cross_entropy)
        >>> {name: tuple(gradient.shape) for name, gradient in each.items()}
        {'weight': (5, 3, 4), 'bias': (5, 3)}
    """
    functional.check_lengths(features, target)
    with functional.as_function(shared, features.device) as function:
        trace = function.trace(function.as_input(features))
        cotangents = len(features) * functional.logit_gradient(trace.logits, functional.as_constant(target), loss_fn)
        each = _of_each_sample(lambda gradient: gradient, function, trace, cotangents, chunk_size)
        return dict(zip(function.names, each, strict=True))


def per_sample_norms(shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
    """Euclidean norm of every sample's gradient over all trainable parameters of ``shared``.

    A module of Linear layers with element-wise functions between them has a closed form. The closed form costs one
    backward pass and forms no sample's gradient. For any other module, the gradients of :func:`per_sample_gradients`
    are formed a few samples at a time.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.

    Returns:
        ``(k,)``, float32 or wider.

    Raises:
        ValueError: as :func:`per_sample_gradients`.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> features, target = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> norms = per_sample_norms(head, features, target, F.cross_entropy)
        >>> each = per_sample_gradients(head, features, target, F.cross_entropy)
        >>> squares = sum(x.flatten(1).square().sum(dim=1) for x in each.values())
        >>> torch.allclose(norms, squares.sqrt())
        True
    """
    functional.check_lengths(features, target)
    with functional.as_function(shared, features.device) as function:
        trace = function.trace(function.as_input(features))
        cotangents = len(features) * functional.logit_gradient(trace.logits, functional.as_constant(target), loss_fn)
        return pulled_back_norms(function, trace, cotangents)


def per_sample_alignment(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, direction: Mapping[str, Tensor]
) -> Tensor:
    """Inner product of every sample's gradient with a direction: a negative product marks a sample that a step hurts.

    A plain step moves the shared module along ``-direction``. To first order, the step then changes a sample's loss by
    minus the learning rate times the sample's product. A sample with a negative product is hurt. One forward-mode pass
    (``torch.func.jvp``) gives all products and forms no sample's gradient. For a module that forward mode cannot
    follow, the gradients of :func:`per_sample_gradients` are formed a few samples at a time.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        direction: by parameter name, a tensor for each trainable parameter, such as a gradient before or after surgery.

    Returns:
        ``(k,)``, float32 or wider.

    Raises:
        KeyError: ``direction`` lacks a trainable parameter.
        ValueError: a tensor of ``direction`` has another shape than its parameter; or as :func:`per_sample_gradients`.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> features, target = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> F.cross_entropy(head(features), target).backward()
        >>> gradient = {name: x.grad for name, x in head.named_parameters()}
        >>> products = per_sample_alignment(
        ...     head, features, target, F.cross_entropy, direction=gradient
        ... )
        >>> squared_norm = sum(x.square().sum() for x in gradient.values())
        >>> torch.allclose(products.mean(), squared_norm)
        True
    """
    functional.check_lengths(features, target)
    with functional.as_function(shared, features.device) as function:
        tangents = _tangents(function, direction)
        trace = function.trace(function.as_input(features))
        cotangents = len(features) * functional.logit_gradient(trace.logits, functional.as_constant(target), loss_fn)
        return pulled_back_products(function, trace, cotangents, tangents)


def pulled_back_products(
    function: SharedFunction, trace: Trace, cotangents: Tensor, tangents: tuple[Tensor, ...]
) -> Tensor:
    """Inner product of each sample's pulled-back cotangent with the tangents, ``(k,)``."""
    if not function.parameters:
        return 0 * functional.row_norms(cotangents)

    def logits_of(*parameters: Tensor) -> Tensor:
        return function.call(parameters, trace.features.clone())

    try:
        # torch's forward mode warns at its first call, because of a module that it imports.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            moved = jvp(logits_of, (*function.constants,), tangents)[1]
        wide = torch.promote_types(moved.dtype, torch.float32)
        products: Tensor = (moved.to(wide) * cotangents.to(wide)).flatten(1).sum(dim=1)
        # Forward mode ignores backward hooks and straight-through functions, so compare with a backward pass.
        if not on_host(products) or _agree(products, _inner(trace.pull(cotangents), tangents)):
            return products
    except Exception:  # many kinds: functions without a forward mode, in-place counters, compiled modules
        pass

    def product(gradient: list[Tensor]) -> list[Tensor]:
        return [_inner(gradient, tangents)]

    (products,) = _of_each_sample(product, function, trace, cotangents, _samples_at_a_time(function))
    return products


def _tangents(function: SharedFunction, direction: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The direction's tensors in the order and the dtype of the parameters."""
    for name, parameter in zip(function.names, function.constants, strict=True):
        if name not in direction:
            raise KeyError(f"direction has no tensor for the trainable parameter {name!r}: give one for each")
        if direction[name].shape != parameter.shape:
            shapes = f"{tuple(direction[name].shape)}, and the parameter {tuple(parameter.shape)}"
            raise ValueError(f"direction[{name!r}] has shape {shapes}: give both one shape")
    pairs = zip(function.names, function.constants, strict=True)
    return tuple(functional.as_constant(direction[name]).to(constant) for name, constant in pairs)


def _inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Inner product over all tensors, 0-dim, float32 or wider."""
    wide = torch.promote_types(first[0].dtype, torch.float32)
    return torch.stack([(x.to(wide) * y.to(wide)).sum() for x, y in zip(first, second, strict=True)]).sum()


def _agree(products: Tensor, total: Tensor) -> bool:
    """Whether the samples' products sum to the product of all samples, within the products' precision."""
    tolerance = torch.finfo(products.dtype).eps ** 0.5 * products.abs().sum()
    return bool(((products.sum() - total).abs() <= tolerance) | ~total.isfinite())


def _samples_at_a_time(function: SharedFunction) -> int:
    return max(1, _MOST_NUMBERS // sum(parameter.numel() for parameter in function.parameters))


def pulled_back_norms(function: SharedFunction, trace: Trace, cotangents: Tensor) -> Tensor:
    """Norm of each sample's pulled-back cotangent, ``(k,)``; 0 where every parameter is frozen."""
    if not function.parameters:
        return 0 * functional.row_norms(cotangents)
    layers = trace.layers(cotangents)
    if layers is not None:
        return functional.closed_form_norms(layers)
    (norms,) = _of_each_sample(_norm, function, trace, cotangents, _samples_at_a_time(function))
    return norms


def _norm(gradient: list[Tensor]) -> list[Tensor]:
    return [functional.row_norms(torch.cat([functional.row_norms(tensor[None]) for tensor in gradient])[None])[0]]


def _of_each_sample(
    measure: Measure, function: SharedFunction, trace: Trace, cotangents: Tensor, chunk_size: int | None
) -> list[Tensor]:
    """What ``measure`` makes of each sample's gradient, ``(k, ...)`` each."""

    def of_one(feature: Tensor, cotangent: Tensor) -> tuple[list[Tensor], Tensor]:
        def weighted_logits(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
            logits = function.call(parameters, feature.unsqueeze(0).clone()).squeeze(0)
            return (logits * cotangent).sum(), logits

        gradient, logits = grad(weighted_logits, has_aux=True)(function.constants)
        return measure(gradient), logits

    of_all = vmap(of_one, chunk_size=chunk_size)
    if torch.compiler.is_compiling():
        measured: list[Tensor] = of_all(trace.features, cotangents)[0]
        return measured
    try:
        measured, logits = of_all(trace.features, cotangents)
        # If a sample's logits depend on the other samples, vmap's logits differ from those of the whole batch.
        tolerance = torch.finfo(logits.dtype).eps ** 0.5
        if not on_host(logits) or torch.allclose(logits, trace.logits, tolerance, tolerance, equal_nan=True):
            return measured
    except Exception:  # many kinds: data-dependent shapes, random numbers, custom functions, sizes of 1
        pass
    rows = torch.arange(len(cotangents), device=cotangents.device).view(-1, *[1] * (cotangents.ndim - 1))
    of_rows = [measure(trace.pull(torch.where(rows == row, cotangents, 0))) for row in range(len(rows))]
    return [torch.stack(column) for column in zip(*of_rows, strict=True)]
