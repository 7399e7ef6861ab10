import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from strategies import bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gaal_surgery import guide_gradient, per_sample_alignment, per_sample_gradients, per_sample_norms

SAMPLES, FEATURES, CLASSES = 6, 5, 3


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, features):
        return self.last(self.second(torch.tanh(self.first(features))))


class Counting(nn.Module):
    """Counts its calls in a buffer, also in eval mode, in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features):
        self.calls.add_(1)
        return self.linear(features)


class Doubled(nn.Linear):
    """A subclass of Linear that is none."""

    def forward(self, features):
        return 2 * super().forward(features)


def frozen(module, name):
    module.get_parameter(name).requires_grad_(False)
    return module


def hooked(before=None, after=None):
    head = nn.Linear(FEATURES, CLASSES)
    if before is not None:
        head.register_forward_pre_hook(lambda module, inputs: (before(*inputs),))
    if after is not None:
        head.register_forward_hook(lambda module, inputs, output: after(output))
    return head


def batch_normed():
    head = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES)).train()
    head(torch.randn(20, FEATURES))  # statistics of its own
    return head


HEADS = {
    "linear": lambda: nn.Linear(FEATURES, CLASSES),
    "linear without bias": lambda: nn.Linear(FEATURES, CLASSES, bias=False),
    "linear with frozen bias": lambda: frozen(nn.Linear(FEATURES, CLASSES), "bias"),
    "linear with frozen weight": lambda: frozen(nn.Linear(FEATURES, CLASSES), "weight"),
    "subclass of linear": lambda: Doubled(FEATURES, CLASSES),
    "linear with a pre-hook": lambda: hooked(before=torch.square),
    "linear with a hook": lambda: hooked(after=torch.square),
    "parametrized linear": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)),
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), frozen(nn.Linear(4, CLASSES), "weight")),
    "batch norm": batch_normed,
    "dropout": lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)),
    "tied": Tied,
    "counting": Counting,
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)),
}
TARGET = torch.tensor([0, 2, 1, 2, 2, 0])
LOSSES = {
    "cross entropy": (F.cross_entropy, TARGET),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), TARGET),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0, 5.0]).double()), TARGET),
    "ignore index": (nn.CrossEntropyLoss(ignore_index=2), TARGET),
    "soft targets": (F.cross_entropy, F.one_hot(TARGET, CLASSES).double() * 0.7 + 0.1),
    "binary": (nn.BCEWithLogitsLoss(), F.one_hot(TARGET, CLASSES).double()),
    "squared error": (nn.MSELoss(), torch.arange(SAMPLES * CLASSES).view(SAMPLES, CLASSES).double() / 7),
}


def build(name):
    """The head in float64 and in train mode with a few flags of its own, and features for it."""
    head = HEADS[name]().double().train()
    for module in list(head.children())[:1]:
        module.eval()
    shape = (2, 3, 3) if name == "convolution" else (FEATURES,)
    return head, torch.randn(SAMPLES, *shape, dtype=torch.float64)


def reference(head, features, target, loss_fn):
    """Sample by sample, by autograd: k times the share of each in the gradient of the batch's loss."""
    head = copy.deepcopy(head).eval()
    parameters = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    logits = head(features)
    shares = torch.autograd.grad(loss_fn(logits, target), logits, retain_graph=True)[0] * len(features)
    each = [
        torch.autograd.grad(row, list(parameters.values()), share, retain_graph=True)
        for row, share in zip(logits, shares, strict=True)
    ]
    return {name: torch.stack(rows) for name, rows in zip(parameters, zip(*each, strict=True), strict=True)}


def norms_of(gradients):
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1).norm(dim=1)


def mean_of(gradients):
    return {name: gradient.mean(dim=0) for name, gradient in gradients.items()}


def snapshot(head):
    """All that a call must leave as it is."""
    return {
        "state": {name: bits(tensor) for name, tensor in head.state_dict().items()},
        "grad": {name: None if p.grad is None else bits(p.grad) for name, p in head.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in head.named_parameters()},
        "modes": [module.training for module in head.modules()],
        "random": bits(torch.get_rng_state()),
    }


FUNCTIONS = {
    "guide_gradient": guide_gradient,
    "clipped guide_gradient": lambda *args: guide_gradient(*args, max_norm=0.1),
    "per_sample_gradients": per_sample_gradients,
    "per_sample_norms": per_sample_norms,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
every_head = pytest.mark.parametrize("name", HEADS)
every_loss = pytest.mark.parametrize(("loss_fn", "target"), LOSSES.values(), ids=LOSSES)


@every_head
class TestEveryHead:
    @every_loss
    def test_every_sample_gets_its_share_of_the_loss(self, name, loss_fn, target):
        head, features = build(name)
        expected = reference(head, features, target, loss_fn)
        torch.testing.assert_close(per_sample_gradients(head, features, target, loss_fn), expected)
        torch.testing.assert_close(per_sample_norms(head, features, target, loss_fn), norms_of(expected))
        torch.testing.assert_close(guide_gradient(head, features, target, loss_fn), mean_of(expected))

    def test_the_mean_is_the_gradient_of_the_batch_by_autograd(self, name):
        head, features = build(name)
        plain = copy.deepcopy(head).eval()
        F.cross_entropy(plain(features), TARGET).backward()
        expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        torch.testing.assert_close(guide_gradient(head, features, TARGET, F.cross_entropy), expected)
        each = per_sample_gradients(head, features, TARGET, F.cross_entropy)
        torch.testing.assert_close(mean_of(each), expected)

    @pytest.mark.parametrize("share", [0.01, 0.5, 2.0])
    def test_clipping_shortens_the_long_samples_before_the_mean(self, name, share):
        head, features = build(name)
        each = reference(head, features, TARGET, F.cross_entropy)
        norms = norms_of(each)
        max_norm = float(norms.median()) * share
        scale = (max_norm / norms).clamp(max=1)
        clipped = {name: torch.einsum("k,k...->k...", scale, gradient) for name, gradient in each.items()}
        actual = guide_gradient(head, features, TARGET, F.cross_entropy, max_norm=max_norm)
        torch.testing.assert_close(actual, mean_of(clipped))

    @pytest.mark.parametrize("chunk_size", [1, 4, SAMPLES, 100])
    def test_chunks_change_nothing(self, name, chunk_size):
        head, features = build(name)
        whole = per_sample_gradients(head, features, TARGET, F.cross_entropy)
        chunked = per_sample_gradients(head, features, TARGET, F.cross_entropy, chunk_size=chunk_size)
        torch.testing.assert_close(chunked, whole)

    @every_function
    def test_the_head_and_the_random_state_are_left_as_they_were(self, name, function):
        head, features = build(name)
        for parameter in list(head.parameters())[1:]:
            parameter.grad = torch.ones_like(parameter)
        before = snapshot(head)
        features.requires_grad_()
        result = function(head, features, TARGET, F.cross_entropy)
        assert snapshot(head) == before
        assert features.grad is None
        for tensor in result.values() if isinstance(result, dict) else [result]:
            assert not tensor.requires_grad


@every_function
class TestEveryFunction:
    @pytest.mark.parametrize("name", ["linear", "batch norm"])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_the_mode_of_the_caller_does_not_matter(self, function, name, context):
        head, features = build(name)
        with context():
            # What an encoder gives under this mode.
            recorded, target = features * 1, TARGET.clone()
            inside = function(head, recorded, target, F.cross_entropy)
        expected = function(head, features, TARGET, F.cross_entropy)
        torch.testing.assert_close(inside, expected)
        torch.testing.assert_close(function(head, recorded, target, F.cross_entropy), expected)

    @pytest.mark.parametrize("name", ["linear", "mlp"])
    def test_half_precision_features_of_an_autocast_encoder_are_taken(self, function, name):
        head = HEADS[name]()
        with torch.autocast("cpu", torch.bfloat16):
            features = nn.Linear(4, FEATURES)(torch.randn(SAMPLES, 4))
            inside = function(head, features, TARGET, F.cross_entropy)
        assert features.dtype == torch.bfloat16
        torch.testing.assert_close(inside, function(head, features.float(), TARGET, F.cross_entropy), rtol=0, atol=0)
        for tensor in inside.values() if isinstance(inside, dict) else [inside]:
            assert tensor.dtype == torch.float32

    def test_lengths_must_match(self, function):
        head, features = build("linear")
        message = r"features \(6, 5\) and target \(5,\) must have the same length"
        with pytest.raises(ValueError, match=message):
            function(head, features, TARGET[:5], F.cross_entropy)

    @pytest.mark.parametrize("name", ["linear", "mlp"])
    @pytest.mark.parametrize("shape", [(SAMPLES, FEATURES + 1), (SAMPLES, 2, 3, 3)])
    def test_features_that_the_head_cannot_take_are_named(self, function, name, shape):
        head, _ = build(name)
        features = torch.randn(shape)
        before = snapshot(head)
        with pytest.raises(ValueError, match=r"features of shape .* cannot be taken by shared"):
            function(head, features, TARGET, F.cross_entropy)
        assert snapshot(head) == before

    def test_a_loss_without_a_mean_is_refused(self, function):
        head, features = build("batch norm")
        before = snapshot(head)
        with pytest.raises(ValueError, match=r"loss_fn must return a scalar, not \(6,\): use its mean reduction"):
            function(head, features, TARGET, nn.CrossEntropyLoss(reduction="none"))
        assert snapshot(head) == before

    @pytest.mark.parametrize("output", [lambda x: x.mean(0), lambda x: x.sum(), lambda x: {"logits": x}])
    def test_the_head_must_give_a_row_for_every_sample(self, function, output):
        class Head(nn.Linear):
            def forward(self, features):
                return output(super().forward(features))

        with pytest.raises(ValueError, match="shared must return one row of logits for each of the 6 samples"):
            function(Head(FEATURES, CLASSES), torch.randn(SAMPLES, FEATURES), TARGET, F.cross_entropy)


@pytest.mark.parametrize(("chunk_size", "chunks"), [(None, 1), (6, 1), (4, 2), (1, 6)])
def test_chunk_size_bounds_the_samples_differentiated_at_a_time(chunk_size, chunks):
    calls = []
    head = hooked(after=lambda output: calls.append(output) or output)
    per_sample_gradients(head, torch.randn(SAMPLES, FEATURES), TARGET, F.cross_entropy, chunk_size=chunk_size)
    assert len(calls) == 1 + chunks  # the first gives the logits


def test_one_sample_is_its_own_mean():
    head, features = build("batch norm")
    each = per_sample_gradients(head, features[:1], TARGET[:1], F.cross_entropy)
    torch.testing.assert_close(guide_gradient(head, features[:1], TARGET[:1], F.cross_entropy), mean_of(each))


def test_a_linear_head_on_sequences_takes_the_general_way():
    head = nn.Linear(FEATURES, CLASSES).double()
    features, target = torch.randn(SAMPLES, 4, FEATURES).double(), torch.randn(SAMPLES, 4, CLASSES).double()
    expected = reference(head, features, target, F.mse_loss)
    torch.testing.assert_close(per_sample_gradients(head, features, target, F.mse_loss), expected)
    torch.testing.assert_close(per_sample_norms(head, features, target, F.mse_loss), norms_of(expected))
    clipped = guide_gradient(head, features, target, F.mse_loss, max_norm=1e9)
    torch.testing.assert_close(clipped, mean_of(expected))


def test_norms_of_half_precision_heads_do_not_overflow():
    head = nn.Linear(FEATURES, CLASSES).half()
    features = torch.full((2, FEATURES), 2000.0).half()  # its squares exceed float16
    norms = per_sample_norms(head, features, torch.tensor([0, 1]), F.cross_entropy)
    assert norms.dtype == torch.float32
    assert norms.isfinite().all()


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_max_norm_must_be_positive(max_norm):
    head, features = build("linear")
    with pytest.raises(ValueError, match="max_norm must be positive, or None for no clipping"):
        guide_gradient(head, features, TARGET, F.cross_entropy, max_norm=max_norm)


def test_clipping_lets_a_sample_without_gradient_be():
    head = nn.Linear(FEATURES, CLASSES)
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    gradient = guide_gradient(head, torch.randn(SAMPLES, FEATURES), TARGET, loss_fn, max_norm=1e-3)
    assert all(tensor.isfinite().all() for tensor in gradient.values())


def test_a_head_without_trainable_parameters_has_gradients_of_norm_zero():
    head = nn.Linear(3, 2).requires_grad_(False)
    features, target = torch.randn(4, 3), torch.zeros(4).long()
    assert guide_gradient(head, features, target, F.cross_entropy, max_norm=1.0) == {}
    torch.testing.assert_close(per_sample_norms(head, features, target, F.cross_entropy), torch.zeros(4))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return output


def routed(features):
    """``vmap`` cannot follow: the shapes depend on the data."""
    return torch.cat([features[features[:, 0] > 0], features[features[:, 0] <= 0]])


CLIPPED = {
    "layers": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, CLASSES)),
    "rows": lambda: hooked_linear_of(64, before=routed),
}


def hooked_linear_of(width, before):
    head = nn.Linear(width, CLASSES)
    head.register_forward_pre_hook(lambda module, inputs: (before(*inputs),))
    return head


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_holds_the_gradient_of_one_sample_at_most(name):
    """By the closed form no sample's gradient is made, row by row one at a time."""
    head, samples = CLIPPED[name](), 50
    features, target = torch.randn(samples, 64), torch.randint(CLASSES, (samples,))
    with Largest() as largest:
        guide_gradient(head, features, target, F.cross_entropy, max_norm=1e-3)
    assert largest.numbers <= features.numel() + 64 * 64
    with Largest() as largest:
        per_sample_gradients(head, features, target, F.cross_entropy)
    assert largest.numbers >= samples * CLASSES * 64  # what this test would see


def test_alignment_forms_the_gradient_of_no_sample():
    head, samples = CLIPPED["layers"](), 50
    features, target = torch.randn(samples, 64), torch.randint(CLASSES, (samples,))
    direction = {name: torch.randn_like(parameter) for name, parameter in head.named_parameters()}
    with Largest() as largest:
        per_sample_alignment(head, features, target, F.cross_entropy, direction)
    assert largest.numbers <= features.numel() + 64 * 64


def test_alignment_needs_a_direction_of_the_parameters():
    head, features, target = nn.Linear(FEATURES, CLASSES), torch.randn(SAMPLES, FEATURES), torch.zeros(SAMPLES).long()
    direction = {"weight": torch.randn(CLASSES, FEATURES)}
    with pytest.raises(KeyError, match="no tensor for the trainable parameter 'bias'"):
        per_sample_alignment(head, features, target, F.cross_entropy, direction)
    with pytest.raises(ValueError, match=r"direction\['bias'\] has shape \(1,\), and the parameter \(3,\)"):
        per_sample_alignment(head, features, target, F.cross_entropy, direction | {"bias": torch.randn(1)})
    frozen(head, "bias")
    assert per_sample_alignment(head, features, target, F.cross_entropy, direction).shape == (SAMPLES,)
