"""The shared module as a function of the features, prepared once a step: logits, pulled-back gradients, norms."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp

from gaal_surgery.shards import put_together

LossFn = Callable[[Tensor, Tensor], Tensor]
# A Linear layer in a backward pass: its input ``(k, D)``, or None where its weight is frozen; the gradient with respect
# to its output ``(k, C)``; and whether its bias trains.
Layer = tuple[Tensor | None, Tensor, bool]

# Nodes of autograd's graph that keep samples apart. The products of Linear layers do so too.
_KEEP_APART = {"Add", "Sub", "Mul", "Clone", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Tanh", "Sigmoid", "Hardtanh"}
_KEEP_APART |= {"Hardsigmoid", "Hardswish", "LogSigmoid", "Mish", "Softplus"}
_RECURRENT = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


@dataclass(frozen=True)
class Trace:
    """One run of the shared module, from which gradients can be pulled back.

    Attributes:
        features: ``(k, ...)``.
        logits: ``(k, ...)``, without a graph.
        pull: from cotangents ``(k, ...)`` to the gradient of ``sum(logits * cotangents)``, a tensor for each parameter.
        layers: from cotangents to the module's Linear layers; None if more than element-wise functions joins them.
    """

    features: Tensor
    logits: Tensor
    pull: Callable[[Tensor], list[Tensor]]
    layers: Callable[[Tensor], list[Layer] | None]


class SharedFunction:
    """The shared module inside :func:`as_function`.

    Attributes:
        names: the names of the trainable parameters. A tied parameter has one name.
        parameters: the trainable parameters, in the order of their names.
        constants: the parameters' values, without a graph.
    """

    def __init__(self, shared: nn.Module, device: torch.device) -> None:
        self.names, self.parameters = list(trainable(shared)), list(trainable(shared).values())
        self._shared, self._device, self._is_linear = shared, device, _is_linear(shared)
        self.constants = [parameter.detach() for parameter in self.parameters]
        self._autocast: torch.dtype | None = None

    def as_input(self, features: Tensor) -> Tensor:
        """The features as constants, in the precision in which the module trains.

        Encoders under autocast give half precision. Features in a dtype that no parameter has are cast to the dtype of
        the first trainable parameter. Integers stay integers.
        """
        features = as_constant(features)
        dtypes = [parameter.dtype for parameter in (*self.parameters, *self._shared.parameters())]
        return features.to(dtypes[0]) if features.is_floating_point() and features.dtype not in dtypes else features

    def logits(self, features: Tensor) -> Tensor:
        """The logits, one row for every sample; no graph is kept.

        Raises:
            ValueError: the module cannot take the features, or does not return one row for each sample.
        """
        with torch.no_grad():
            return self._run(features)

    def trace(self, features: Tensor) -> Trace:
        """Run the module so that gradients can be pulled back.

        Raises:
            ValueError: as :meth:`logits`.
        """
        if self._is_linear and features.ndim == 2:
            return Trace(
                features,
                self.logits(features),
                lambda d: [d.T @ features if name == "weight" else d.sum(dim=0) for name in self.names],
                lambda d: [(features if "weight" in self.names else None, d, "bias" in self.names)],
            )
        if torch.compiler.is_compiling():
            logits, pull, *_ = vjp(lambda parameters: self.call(parameters, features), self.constants)
            return Trace(features, logits, lambda d: pull(d)[0], lambda d: None)
        logits = self._run_with_graph(features)

        def pull_back(cotangents: Tensor) -> list[Tensor]:
            if not (logits.requires_grad and self.parameters):
                return [torch.zeros_like(parameter) for parameter in self.parameters]
            gradients = _pulled_back(logits, self.parameters, cotangents)
            return self._by_backward(features, cotangents) if None in gradients else gradients

        return Trace(features, logits.detach(), pull_back, lambda d: _linear_layers(logits, self.parameters, d))

    def call(self, parameters: Sequence[Tensor], features: Tensor) -> Tensor:
        """The logits of the module with other tensors in the place of its trainable parameters, for ``torch.func``."""
        place = {id(parameter): tensor for parameter, tensor in zip(self.parameters, parameters, strict=True)}
        slots = {
            f"{prefix}.{name}".lstrip("."): place[id(parameter)]
            for prefix, module in self._shared.named_modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in place
        }
        # Copy the buffers, so that a module that counts in eval mode leaves no trace. torch.func needs them made here.
        slots |= {name: buffer.clone() for name, buffer in self._shared.named_buffers()}
        with autocast(self._device, self._autocast):
            # tie_weights=True would destroy a module that is used twice.
            logits: Tensor = functional_call(self._shared, slots, (features,), tie_weights=False)
        return logits

    def _run(self, features: Tensor) -> Tensor:
        called = f"features of shape {tuple(features.shape)} cannot be taken by shared ({type(self._shared).__name__})"
        with explaining(f"{called}; pass what the module is called on in training"):
            logits = self._call_module(features)
        if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != len(features):
            raise ValueError(f"shared must return one row of logits for each of the {len(features)} samples")
        return logits

    def _call_module(self, features: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.call(self.constants, features)
        try:
            with autocast(self._device, self._autocast):
                # Copy, as the module's first operation may work in place.
                return self._shared(features if self._is_linear else features.clone())
        except RuntimeError:
            if self._autocast is not None or not _has_autocast(self._device):
                raise
            # Some modules run only under autocast, such as a frozen bfloat16 layer before a float32 layer.
            low = features.dtype in (torch.bfloat16, torch.float16)
            self._autocast = features.dtype if low else torch.get_autocast_dtype(self._device.type)
            with suppress(Exception):
                return self._call_module(features)
            raise

    @torch.enable_grad()
    def _run_with_graph(self, features: Tensor) -> Tensor:
        # In training, features from an encoder require a gradient. Reentrant checkpoints need that.
        return self._run(features.detach().requires_grad_(features.is_floating_point()))

    def _by_backward(self, features: Tensor, cotangents: Tensor) -> list[Tensor]:
        """The gradients by ``backward``, as in training: reentrant checkpoints and the like allow no other way.

        Leaves that stand in for the parameters collect the gradients. The parameters' own ``.grad`` and hooks are not
        touched.
        """
        leaves = {parameter: nn.Parameter(parameter.detach()) for parameter in self.parameters}
        tables = [module._parameters for module in self._shared.modules()]
        slots = [(table, name, x) for table in tables for name, x in table.items() if x in leaves]
        for table, name, parameter in slots:
            table[name] = leaves[parameter]
        try:
            torch.autograd.backward(self._run_with_graph(features), cotangents)
        finally:
            for table, name, parameter in slots:
                table[name] = parameter
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]


@contextmanager
def as_function(shared: nn.Module, device: torch.device) -> Iterator[SharedFunction]:
    """The module in eval mode and in its own precision, also inside autocast. Afterwards everything is restored.

    Restored are every parameter, buffer, flag, attribute and hook of the module and of its submodules, and the random
    generators, also after an error. Parameters that FSDP2 has sharded are put together meanwhile.
    """
    modes = [(module, module.training) for module in shared.modules()]
    try:
        for module, _ in modes:
            module.training = False
        if torch.compiler.is_compiling():
            with autocast(device, None):
                yield SharedFunction(shared, device)
        else:
            with torch.inference_mode(False), same_random_numbers(device), _as_it_was(shared), autocast(device, None):
                put_together(shared)
                yield SharedFunction(shared, device)
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the random generators after the block. A CUDA graph's generator cannot be restored."""
    on_cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    with torch.random.fork_rng([device] if on_cuda else []):
        yield


@contextmanager
def _as_it_was(shared: nn.Module) -> Iterator[None]:
    """Restore what the modules change in themselves: attributes, lists and tables in attributes, buffers."""
    tables = [table for module in shared.modules() for table in (vars(module), *vars(module).values())]
    memory = [(table, copy.copy(table)) for table in tables if isinstance(table, (dict, list, set))]
    try:
        copies: dict[Tensor, Tensor] = {}  # stand in for buffers, which a user's graph may have saved
        for module in shared.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(buffer, buffer.clone())
            if isinstance(module, nn.RNNBase) and type(module).forward in _RECURRENT:
                # cuDNN refuses a backward pass in eval mode.
                vars(module).update(training=True, dropout=0.0)
            if isinstance(module, nn.parallel.DistributedDataParallel):
                module.require_backward_grad_sync = False  # its reducer would wait for a backward pass
        yield
    finally:
        for table, content in memory:
            table.clear()
            table.extend(content) if isinstance(table, list) else table.update(content)


def logit_gradient(logits: Tensor, target: Tensor, loss_fn: LossFn) -> Tensor:
    """Gradient of the batch's loss with respect to the logits. Row ``i`` is sample ``i``'s share of the gradient.

    Raises:
        ValueError: the loss cannot take the target, or is not a scalar.
    """

    def loss(logits: Tensor) -> Tensor:
        called = f"target of shape {tuple(target.shape)}, {target.dtype}, cannot be taken by loss_fn with logits "
        with explaining(f"{called}{tuple(logits.shape)}; pass what the loss is called on in training"):
            value = loss_fn(logits, target)
        if value.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, not {tuple(value.shape)}: use its mean reduction")
        return value

    if torch.compiler.is_compiling():
        gradient: Tensor = torch.func.grad(loss)(logits)
        return gradient
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


@contextmanager
def explaining(where: str) -> Iterator[None]:
    """Prefix an error of the block with the place where the error arose."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error


def closed_form_norms(layers: list[Layer]) -> Tensor:
    """Norm of every sample's gradient, ``(k,)``, for a module of Linear layers.

    On a layer, the weight's gradient for sample ``i`` is the outer product of the output error ``d_i`` and the input
    ``u_i``. The bias's gradient is ``d_i``. Together they have the norm ``|d_i| * sqrt(|u_i|^2 + 1)``, so neither is
    formed (Goodfellow, 2015, "Efficient per-example gradient computations").
    """
    norms = []
    for inputs, errors, bias in layers:
        factors = [row_norms(errors.new_ones(len(errors), 1))] * bias + ([] if inputs is None else [row_norms(inputs)])
        norms.append(row_norms(errors) * row_norms(torch.stack(factors, dim=1)))
    return row_norms(torch.stack(norms, dim=1))


def row_norms(rows: Tensor) -> Tensor:
    """The norms ``(k,)`` of rows ``(k, ...)``, float32 or wider."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1, dtype=dtype)
    return norms


def trainable(shared: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name; a tied parameter appears once."""
    return {name: parameter for name, parameter in shared.named_parameters() if parameter.requires_grad}


def check_lengths(features: Tensor, target: Tensor) -> None:
    """Raise unless there is one target for every row of features."""
    if features.ndim == 0 or target.ndim == 0 or len(features) != len(target):
        shapes = f"features {tuple(features.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes} must have the same length: pass one target for every row of features")


def as_constant(tensor: Tensor) -> Tensor:
    """The tensor without a graph. A tensor from ``inference_mode`` is copied, as autograd cannot save it."""
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor.detach()


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to the dtype; None switches autocast off. On a device without autocast this does nothing."""
    if not _has_autocast(device):
        return nullcontext()
    # Without cache_enabled=False a cast made without a graph would be reused where a graph is needed.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def _has_autocast(device: torch.device) -> bool:
    # Compilers before torch 2.13 cannot ask, and no compiler serves a device without autocast.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)


def _is_linear(shared: nn.Module) -> bool:
    """Whether the module is one matrix product. A subclass, parametrization, hook or DTensor may be something else."""
    hooks = (shared._forward_hooks, shared._forward_pre_hooks, shared._backward_hooks, shared._backward_pre_hooks)
    plain = all(type(x) is nn.Parameter and not x._backward_hooks for x in shared.parameters())
    return type(shared) is nn.Linear and plain and not any(hooks)


def _pulled_back(logits: Tensor, inputs: Any, cotangents: Tensor) -> list[Any]:
    return list(torch.autograd.grad(logits, inputs, cotangents, retain_graph=True, allow_unused=True))


def _linear_layers(logits: Tensor, parameters: list[nn.Parameter], cotangents: Tensor) -> list[Layer] | None:
    """The module's Linear layers, read off autograd's graph; None where the module does anything else.

    Element-wise functions between the layers are allowed, because they keep samples apart.
    """
    trained = {id(parameter) for parameter in parameters}
    layers: list[tuple[Any, Tensor | None, bool]] = []
    waiting, seen = [logits.grad_fn], {None}
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [edge[0] for edge in node.next_functions]
        if node.name() in ("AddmmBackward0", "MmBackward0"):
            *bias, features, transposed = inputs
            weight = transposed.next_functions[0][0] if transposed and transposed.name() == "TBackward0" else transposed
            leaves = [leaf for leaf in (weight, *bias) if leaf]
            # The gradient of a parameter that is used twice is a sum of products.
            if not {id(getattr(leaf, "variable", None)) for leaf in leaves} <= trained or not seen.isdisjoint(leaves):
                return None
            if bias and not node._saved_alpha == node._saved_beta == 1:
                return None
            seen.update(leaves)
            if leaves:
                rows = (node._saved_mat1 if bias else node._saved_self).detach() if weight else None
                layers.append((node, rows, any(bias)))
            waiting.append(features)
        elif node.name().removesuffix("Backward0") in _KEEP_APART:
            waiting += inputs
        elif id(getattr(node, "variable", logits)) in trained | {id(logits)}:  # anything but the features' leaf
            return None
    errors = _pulled_back(logits, [GradientEdge(node, 0) for node, *_ in layers], cotangents)
    return [(rows, error, bias) for (_, rows, bias), error in zip(layers, errors, strict=True)] or None
