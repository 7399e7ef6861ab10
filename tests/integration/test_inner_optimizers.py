"""Any optimizer can be wrapped: torch's own, from its listing, and those that users bring from other packages."""

import copy
from functools import partial
from inspect import isclass

import pytest
import pytorch_optimizer
import reference
import schedulefree
import torch
from reference import assert_identical, frozen_copy
from torch import nn
from wrapped import ALIGN, RECIPE, backward, cosine, flat, guide_of, saved_and_loaded, train_by_hand

from gaal_surgery import GradientAlignedAlternator


def over(cls, **settings):
    """Builds an optimizer of all trainable parameters of a model."""
    return lambda model: cls([parameter for parameter in model.parameters() if parameter.requires_grad], **settings)


def matrices(cls):
    """For optimizers of matrices alone; biases would belong to another one."""

    def build(model):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 2)
        return over(cls)(model)

    return build


def matrices_and_the_rest(cls):
    """For optimizers that treat matrices in their own way and the rest as AdamW: the head is split over two groups."""

    def build(model):
        hidden = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
        return cls([{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}])

    return build


def in_train_mode(cls):
    """Schedule-free optimizers keep two sets of weights, and step the one of training."""

    def build(model):
        optimizer = over(cls)(model)
        optimizer.train()
        return optimizer

    return build


def lookahead(model):
    return pytorch_optimizer.Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01), k=2)


# LBFGS evaluates closures (it is refused), and SparseAdam takes no dense gradient (it may train encoders, below).
OF_TORCH = {
    name: over(cls)
    for name, cls in vars(torch.optim).items()
    if isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
# Of the hundred of pytorch_optimizer those that timm or the Hugging Face Trainer offers too, which is what they are
# used through; then the best known of other mechanisms: no learning rate, Shampoo's basis, slow weights.
OF_OTHERS = {
    **{
        name: over(getattr(pytorch_optimizer, name))
        for name in (
            *("AdaBelief", "AdEMAMix", "Adan", "ADOPT", "Lamb", "Lion", "MADGRAD", "StableAdamW"),
            *("Prodigy", "Ranger", "SOAP"),
        )
    },
    "Ranger21": over(pytorch_optimizer.Ranger21, num_iterations=100),
    "Lookahead": lookahead,
    "MuonWithAdamW": matrices_and_the_rest(pytorch_optimizer.Muon),
    **{
        name: in_train_mode(getattr(schedulefree, name))
        for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
    },
}
MUON = {"Muon": matrices(torch.optim.Muon)} if hasattr(torch.optim, "Muon") else {}  # since torch 2.9
INNER = {**OF_TORCH, **MUON, **OF_OTHERS}
EVERY_INNER = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def wrap(inner, *, dtype=torch.float32, **settings):
    model = reference.make_model(dtype=dtype)
    return model, GradientAlignedAlternator(inner(model), model.head, **settings)


def wrapped_and_bare(inner, **settings):
    """A model under the wrapper and its twin under the bare optimizer."""
    model, twin = reference.make_model(), reference.make_model()
    return (model, GradientAlignedAlternator(inner(model), model.head, **settings)), (twin, inner(twin))


@ALIGN
@EVERY_INNER
def test_without_a_guide_it_trains_as_if_bare(inner, align):
    (model, optimizer), (twin, bare) = wrapped_and_bare(inner, align=align)
    for batch in reference.make_batches(4):
        for turn in optimizer.turns("image", "table"):
            for one, its_optimizer in ((model, optimizer), (twin, bare)):
                backward(one, batch, turn.modality)
                its_optimizer.step()
                its_optimizer.zero_grad()
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@EVERY_INNER
def test_gradients_are_aligned_as_by_hand(inner):
    (model, optimizer), (twin, bare) = wrapped_and_bare(inner)
    batches = reference.make_batches(5)
    objected = reference.train(optimizer, model, batches)
    assert any(objected)
    assert train_by_hand(bare, twin, batches) == objected
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@EVERY_INNER
def test_the_step_that_it_really_takes_is_aligned(inner):
    """In float64, where the difference of two weights is the step."""
    model, optimizer = wrap(inner, dtype=torch.float64, align="update")
    objected = []
    for batch in reference.make_batches(12, dtype=torch.float64):
        turns = reference.take_turns(optimizer, model, batch)
        for guide in ("table", "image"):
            guide_gradient, before = guide_of(model, batch, guide), copy.deepcopy(model.head.state_dict())
            _, stats = next(turns)
            step = flat(before, guide_gradient) - flat(model.head.state_dict(), guide_gradient)
            objected.append(bool(stats.intervened[guide]))
            assert cosine(step, flat(guide_gradient, guide_gradient)) > -1e-6
    assert any(objected)


@ALIGN
@EVERY_INNER
def test_its_training_resumes_from_a_checkpoint(inner, align):
    model, optimizer = wrap(inner, align=align)
    batches = reference.make_batches(6)
    reference.train(optimizer, model, batches[:3], recipe="cached")
    checkpoint = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    resumed, its_optimizer = wrap(inner, align=align)
    for part, state in zip((resumed, its_optimizer), checkpoint, strict=True):
        part.load_state_dict(state)
    objected = reference.train(optimizer, model, batches[3:], recipe="cached")
    assert reference.train(its_optimizer, resumed, batches[3:], recipe="cached") == objected
    assert_identical(frozen_copy(resumed, its_optimizer), frozen_copy(model, optimizer))


# Implementations of one optimizer.


IMPLEMENTATIONS = {
    f"{cls.__name__}_{name}": (partial(cls, lr=0.01, weight_decay=0.1), {name: True})
    for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    for name in ("foreach", "fused")
}


@ALIGN
@pytest.mark.parametrize(("cls", "flag"), IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_implementations_agree_on_gradients_written_in_place(cls, flag, align):
    batches = reference.make_batches(6)

    def trained(**flags):
        model, optimizer = wrap(over(cls, **flags), align=align)
        seen = []
        optimizer.base.register_step_pre_hook(lambda *_: seen.append(model.head.weight.grad))
        for inputs, target in batches:
            for turn in optimizer.turns(*inputs):
                backward(model, (inputs, target), turn.modality)
                gradient = model.head.weight.grad
                optimizer.guide(turn.guides[0], model.encoders[turn.guides[0]](inputs[turn.guides[0]]), target)
                optimizer.step()
                assert seen[-1] is gradient
                assert model.head.weight.grad is gradient
                optimizer.zero_grad()
        return model.state_dict()

    torch.testing.assert_close(trained(**flag), trained(foreach=False))


# Sparse gradients of an encoder: in the wrapped optimizer, or in one beside it.


def with_an_embedding(sparse):
    model = reference.make_model()
    model.encoders["table"] = nn.Sequential(nn.EmbeddingBag(20, reference.HIDDEN, sparse=sparse), nn.Tanh())
    with torch.no_grad():
        model.encoders["table"][0].weight.copy_(torch.linspace(-2, 2, 80).reshape(20, 4).sin())
    return model


def with_words(batches):
    words = torch.randint(20, (len(batches), 8, 3), generator=torch.Generator().manual_seed(0))
    return [({**inputs, "table": rows}, target) for (inputs, target), rows in zip(batches, words, strict=True)]


# Torch's Adagrad and SparseAdam make sparse tensors without a word on checks.
UNCHECKED_SPARSE = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")


@ALIGN
@UNCHECKED_SPARSE
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_an_encoder_with_sparse_gradients_trains_as_with_dense_ones(cls, align):
    def trained(sparse):
        model = with_an_embedding(sparse)
        optimizer = GradientAlignedAlternator(cls(model.parameters(), lr=0.1), model.head, align=align)
        return reference.train(optimizer, model, with_words(reference.make_batches(5))), model.state_dict()

    (objected, sparse), (_, dense) = trained(sparse=True), trained(sparse=False)
    assert any(objected)
    torch.testing.assert_close(sparse, dense)


@RECIPE
@UNCHECKED_SPARSE
def test_sparse_adam_trains_an_encoder_beside_it(recipe):
    """It refuses dense gradients, so the rest has an optimizer of its own: that one is wrapped."""
    model = with_an_embedding(sparse=True)
    embedding = model.encoders["table"][0]
    rest = [parameter for parameter in model.parameters() if parameter is not embedding.weight]
    optimizer = GradientAlignedAlternator(torch.optim.AdamW(rest, lr=0.01), model.head)
    beside = torch.optim.SparseAdam(embedding.parameters(), lr=0.01)
    objected = []
    for batch in with_words(reference.make_batches(5)):
        for modality, stats in reference.take_turns(optimizer, model, batch, recipe=recipe):
            before = embedding.weight.detach().clone()
            beside.step()
            beside.zero_grad()
            assert torch.equal(embedding.weight, before) is (modality == "image")
            objected.append(any(bool(flag) for flag in stats.intervened.values()))
    assert any(objected)


# What schedule-free optimizers ask of the user.


def test_a_schedule_free_optimizer_changes_its_mode_through_base():
    model, optimizer = wrap(over(schedulefree.AdamWScheduleFree))
    batches = reference.make_batches(4)
    with pytest.raises(Exception, match="not in train mode"):
        reference.train(optimizer, model, batches[:1])
    optimizer.zero_grad()
    optimizer.base.train()
    reference.train(optimizer, model, batches)
    training = copy.deepcopy(model.state_dict())
    optimizer.base.eval()
    assert not torch.equal(model.head.weight, training["head.weight"])
    optimizer.base.train()
    torch.testing.assert_close(model.state_dict(), training)


# Those that evaluate a closure several times.


SAM = {"base_optimizer": torch.optim.SGD, "lr": 0.1}
SEVERAL_EVALUATIONS = {
    "SAM": over(pytorch_optimizer.SAM, **SAM),
    "LookSAM": over(pytorch_optimizer.LookSAM, **SAM),
    "FriendlySAM": over(pytorch_optimizer.FriendlySAM, **SAM),
    "BSAM": over(pytorch_optimizer.BSAM, num_data=8),
    "LBFGS": over(torch.optim.LBFGS),
    "AdamWScheduleFreeClosure": over(schedulefree.AdamWScheduleFreeClosure),
}


@pytest.mark.parametrize(("name", "inner"), SEVERAL_EVALUATIONS.items(), ids=SEVERAL_EVALUATIONS)
def test_one_that_evaluates_a_closure_several_times_is_refused_by_name(name, inner):
    with pytest.raises(ValueError, match=rf"optimizer must not be {name}, which evaluates a closure several times"):
        wrap(inner)
