"""Any head that PyTorch trains is a head: the zoo of ``heads.py`` against plain autograd on a deep copy."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from heads import KINDS, SAMPLES, Recurrent
from torch import nn

from gaal_surgery import (
    GradientAlignedAlternator,
    HalfSpace,
    align,
    entropy,
    guide_gradient,
    per_sample_alignment,
    per_sample_gradients,
    per_sample_norms,
    select_uncertain,
)

EVERY_KIND = pytest.mark.parametrize("name", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


def build(name):
    torch.manual_seed(0)
    kind = KINDS[name]
    head = kind.build()
    with kind.around():
        head(
            from_an_encoder(kind.batch(seed=9)[0], next(p.dtype for p in head.parameters() if p.requires_grad))
        ).float().sum().backward()  # as in training: statistics, gradients
    return kind, head


def from_an_encoder(features, dtype=None):
    """Features as training has them: with a graph, and no leaf."""
    if not features.is_floating_point():
        return features.clone()
    return features.to(dtype or features.dtype).requires_grad_().clone()


def in_eval_mode(head):
    with torch.no_grad():  # a scripted module copies leaves as such in here alone
        twin = copy.deepcopy(head).eval()
    for parameter, its in zip(head.parameters(), twin.parameters(), strict=True):
        its.requires_grad_(parameter.requires_grad)
    if isinstance(head, nn.DataParallel):
        twin.module.eval()
    return twin


def expected_gradient(kind, head, features, target, weights=None):
    """By autograd on a copy; with weights, of the weighted sum of the samples' shares of the loss."""
    twin = in_eval_mode(head)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    features = from_an_encoder(features, next(iter(parameters.values())).dtype)
    with kind.around(), torch.enable_grad():
        for parameter in parameters.values():
            parameter.grad = None
        logits = twin(features)
        cotangents = torch.autograd.grad(F.cross_entropy(logits, target), logits, retain_graph=True)[0]
        if weights is not None:
            cotangents = cotangents * weights[:, None]
        logits.backward(cotangents)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def expected_of_each(kind, head, features, target):
    ones = torch.eye(len(target))
    each = [expected_gradient(kind, head, features, target, len(target) * ones[i]) for i in range(len(target))]
    return {name: torch.stack([gradient[name] for gradient in each]) for name in each[0]}


def norms_of(each):
    return torch.stack([tensor.reshape(SAMPLES, -1).norm(dim=1) for tensor in each.values()]).norm(dim=0)


def snapshot(head, features):
    """Everything that must be as before: identities, values, flags, hooks, attributes."""
    parts = []
    for module in head.modules():
        attributes = {
            name: [id(x) for x in value] if isinstance(value, list) else id(value)
            for name, value in vars(module).items()
            if not isinstance(value, dict) and name != "training"
        }
        tables = {name: {k: id(x) for k, x in v.items()} for name, v in vars(module).items() if isinstance(v, dict)}
        parts.append((module.training, attributes, tables))
    tensors = [
        *head.parameters(),
        *head.buffers(),
        *(p.grad for p in head.parameters() if p.grad is not None),
        features,
    ]
    return parts, [x.detach().double().tolist() for x in tensors], torch.get_rng_state().tolist()


def assert_close(kind, actual, expected):
    assert set(actual) == set(expected)
    scale = max(float(tensor.double().norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert float((actual[name].double() - tensor.double()).norm()) <= kind.tolerance * scale, name


@EVERY_KIND
class TestEveryKind:
    def test_guide_gradient(self, name):
        kind, head = build(name)
        features, target = kind.batch()
        expected = expected_gradient(kind, head, features, target)
        before = snapshot(head, features)
        with kind.around():
            actual = guide_gradient(head, features, target, F.cross_entropy)
        assert snapshot(head, features) == before
        assert_close(kind, actual, expected)

    def test_per_sample_gradients_and_norms(self, name):
        kind, head = build(name)
        features, target = kind.batch()
        expected = expected_of_each(kind, head, features, target)
        mean = expected_gradient(kind, head, features, target)
        before = snapshot(head, features)
        with kind.around():
            each = per_sample_gradients(head, features, target, F.cross_entropy)
            norms = per_sample_norms(head, features, target, F.cross_entropy)
        assert snapshot(head, features) == before
        assert_close(kind, each, expected)
        assert_close(kind, {key: tensor.mean(dim=0) for key, tensor in each.items()}, mean)
        assert_close(kind, {"norms": norms.double()}, {"norms": norms_of(expected).double()})

    def test_per_sample_alignment(self, name):
        kind, head = build(name)
        features, target = kind.batch()
        expected = expected_of_each(kind, head, features, target)
        direction = {key: torch.randn_like(tensor[0]) for key, tensor in expected.items()}
        products = sum(
            (tensor * direction[key]).view(len(features), -1).sum(dim=1).double() for key, tensor in expected.items()
        )
        before = snapshot(head, features)
        with kind.around():
            actual = per_sample_alignment(head, features, target, F.cross_entropy, direction)
        assert snapshot(head, features) == before
        assert_close(kind, {"products": actual.double()}, {"products": products})

    def test_clipped_guide_gradient(self, name):
        kind, head = build(name)
        features, target = kind.batch()
        norms = norms_of(expected_of_each(kind, head, features, target))
        limit = float(norms.median())
        assert limit > 0
        expected = expected_gradient(kind, head, features, target, (limit / norms).clamp(max=1))
        before = snapshot(head, features)
        with kind.around():
            actual = guide_gradient(head, features, target, F.cross_entropy, max_norm=limit)
        assert snapshot(head, features) == before
        assert_close(kind, actual, expected)

    @pytest.mark.parametrize("max_norm", [None, 0.5])
    @pytest.mark.parametrize("align_", ["gradient", "update"])
    def test_a_guided_step(self, name, align_, max_norm):
        kind, head = build(name)
        rule = HalfSpace(margin=0.9, relative=True)
        settings = {"rule": rule, "align": align_, "max_norm": max_norm}
        optimizer = GradientAlignedAlternator(torch.optim.SGD(head.parameters(), 0.1), shared=head, **settings)
        features, target = kind.batch(seed=1)
        other, its_target = kind.batch(seed=2)
        dtype = next(p.dtype for p in head.parameters() if p.requires_grad)
        with kind.around():
            optimizer.zero_grad()
            F.cross_entropy(head(from_an_encoder(features, dtype)), target).backward()
            reference = copy.deepcopy(head)
            logits = in_eval_mode(head)(from_an_encoder(other, dtype))
            chosen = select_uncertain(entropy(logits.detach()), 0.5)
            wanted = guide_gradient(head, other[chosen], its_target[chosen], F.cross_entropy, max_norm=max_norm)
            gradient = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
            wanted = {n: wanted[n] for n in gradient}
            expected = align(gradient, [wanted], rule)
            before = snapshot(head, other)
            optimizer.guide("other", other, its_target)
            optimizer.step()
        assert bool(optimizer.stats.intervened["other"])
        after = snapshot(head, other)
        assert (after[0], after[2]) == (before[0], before[2])
        for n, parameter in reference.named_parameters():
            moved = parameter - 0.1 * expected[n] if n in gradient else parameter
            torch.testing.assert_close(dict(head.named_parameters())[n], moved, rtol=1e-4, atol=1e-5)
        copy.deepcopy(head)
        torch.save(head.state_dict(), io.BytesIO())


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_run_as_cudnn_can_differentiate_them(cell):
    """cuDNN refuses a backward pass in eval mode: such a layer alone runs in training mode, with its dropout off."""
    head = Recurrent(cell, num_layers=2, dropout=0.5)
    found = []
    head.cell.register_forward_pre_hook(lambda its, _: found.append((its.training, its.dropout, head.training)))
    guide_gradient(head, torch.randn(4, 6, 5), torch.tensor([0, 1, 2, 0]), F.cross_entropy)
    assert found == [(True, 0.0, False)]
    assert (head.cell.training, head.cell.dropout, head.training) == (True, 0.5, True)
    guide_gradient(head.eval(), torch.randn(4, 6, 5), torch.tensor([0, 1, 2, 0]), F.cross_entropy)
    assert (head.cell.training, head.cell.dropout) == (False, 0.5)
