"""The alternator is a torch optimizer everywhere: one test for each way in which other wrappers broke."""

import copy
import pickle
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from reference import assert_identical, frozen_copy
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from wrapped import ADAMW, ALIGN, INNER, SGD, backward, build

from gaal_surgery import GradientAlignedAlternator, HalfSpace

# What an optimizer has: groups, state, defaults.


def test_it_is_an_optimizer():
    assert isinstance(build()[1], torch.optim.Optimizer)


def test_wrapping_keeps_what_the_inner_optimizer_has(batch):
    model = reference.make_model()
    inner = ADAMW(model.parameters())
    backward(model, batch)
    inner.step()
    before = frozen_copy(inner)
    groups, state, defaults = inner.param_groups, inner.state, inner.defaults
    optimizer = GradientAlignedAlternator(inner, model.head)
    assert optimizer.base is inner
    assert inner.param_groups is groups
    assert inner.state is state
    assert inner.defaults is defaults
    assert_identical(frozen_copy(inner), before)


def test_groups_state_and_defaults_are_the_inner_ones_both_ways(trained):
    _, optimizer = trained
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # replaces the inner lists
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(optimizer.base, name)
        replacement = copy.copy(getattr(optimizer, name))
        setattr(optimizer, name, replacement)
        assert getattr(optimizer.base, name) is replacement
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.base.param_groups[0]["lr"] == 0.5
    optimizer.base.param_groups[0]["lr"] = 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_an_edited_learning_rate_is_the_one_stepped_with_also_after_loading(trained, batch):
    model, optimizer = trained
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = frozen_copy(model)
    backward(model, batch)
    optimizer.step()
    assert_identical(frozen_copy(model), before)


def test_an_added_group_reaches_the_inner_optimizer(batch):
    model = reference.make_model()
    inner = torch.optim.SGD(model.head.parameters(), lr=0.1)
    optimizer = GradientAlignedAlternator(inner, model.head)
    optimizer.add_param_group({"params": [*model.encoders["image"].parameters()], "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.1, 0.5]
    before = copy.deepcopy(model)
    optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    step = 0.5 * model.encoders["image"][0].weight.grad
    assert_identical(model.encoders["image"][0].weight, before.encoders["image"][0].weight - step)


def test_zero_grad_leaves_none_unless_asked_for_zeros(batch):
    model, optimizer = build()
    backward(model, batch)
    optimizer.zero_grad(set_to_none=False)
    assert not model.head.weight.grad.any()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_repr_shows_the_settings_and_the_inner_optimizer():
    _, optimizer = build(align="update", rule=HalfSpace(margin=0.1, relative=True))
    text = repr(optimizer)
    assert repr(optimizer.base) in text
    assert "Linear" in text
    assert repr(optimizer.rule) in text
    assert "'update'" in text


# Copies.


def pickled(item):
    return pickle.loads(pickle.dumps(item))


COPY = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])


@COPY
@INNER
def test_a_copy_of_model_and_optimizer_stays_tied_and_trains_alike(inner, duplicate):
    model, optimizer = build(inner=inner, fraction={"image": 0.5, "table": 1.0})
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1)
    reference.train(optimizer, model, reference.make_batches(2), recipe="cached")
    scheduler.step()
    before = frozen_copy(model, optimizer)
    twin, its_optimizer = duplicate((model, optimizer))
    assert its_optimizer.shared is twin.head
    reference.train(its_optimizer, twin, reference.make_batches(2, seed=1), recipe="cached")
    assert_identical(frozen_copy(model, optimizer), before)
    assert not torch.equal(twin.head.weight, model.head.weight)
    reference.train(optimizer, model, reference.make_batches(2, seed=1), recipe="cached")
    assert_identical(frozen_copy(twin, its_optimizer), frozen_copy(model, optimizer))
    its_scheduler = lr_scheduler.StepLR(its_optimizer, step_size=1)
    its_optimizer.step()
    its_scheduler.step()


@COPY
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(duplicate, trained):
    model, optimizer = trained
    before = frozen_copy(model, optimizer)
    its_optimizer = duplicate(optimizer)
    assert_identical(frozen_copy(its_optimizer), before[1:])
    for parameter in its_optimizer.shared.parameters():
        parameter.grad = torch.ones_like(parameter)
    its_optimizer.step()
    assert its_optimizer.stats.guides
    assert not torch.equal(its_optimizer.shared.weight, model.head.weight)
    assert_identical(frozen_copy(model, optimizer), before)


class WithNotes(GradientAlignedAlternator):
    """What a user's subclass adds, in its constructor and later."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.notes = ["first"]


@COPY
def test_a_copy_of_a_subclass_keeps_what_it_added(duplicate):
    model = reference.make_model()
    optimizer = WithNotes(SGD(model.parameters()), model.head)
    optimizer.name = "mine"
    twin = duplicate(optimizer)
    assert isinstance(twin, WithNotes)
    assert (twin.notes, twin.name) == (["first"], "mine")
    assert twin.notes is not optimizer.notes


@COPY
def test_a_copy_made_in_the_middle_of_a_turn_takes_the_same_step(duplicate, batch):
    model, optimizer = build()
    for turn in optimizer.turns("image", "table"):
        optimizer.guide(turn.guides[0], *backward(model, batch, turn.modality))
        twin, its_optimizer = duplicate((model, optimizer))
        for parameter, original in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.grad = None if original.grad is None else original.grad.clone()
        optimizer.step()
        its_optimizer.step()
        assert its_optimizer.stats.guides == turn.guides
        assert_identical(frozen_copy(twin, its_optimizer), frozen_copy(model, optimizer))
        optimizer.zero_grad()


# Hooks.


def test_step_hooks_fire_once_a_step_around_it(batch):
    """Also where other wrappers, copies and shells were made: the class's step is patched once."""
    model, optimizer = build()
    build()
    copy.deepcopy(optimizer)
    events = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: events.append("before")),
        optimizer.base.register_step_pre_hook(lambda *_: events.append("inner")),
        optimizer.register_step_post_hook(lambda *_: events.append("after")),
    ]
    backward(model, batch)
    optimizer.step()
    assert events == ["before", "inner", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(events) == 3


def test_a_hook_of_the_inner_optimizer_sees_the_aligned_gradient(batch):
    model, optimizer = build(loss_fn=lambda logits, target: -F.cross_entropy(logits, target), fraction=1.0)
    seen = []
    optimizer.base.register_step_pre_hook(lambda *_: seen.append(float(model.head.weight.grad.norm())))
    optimizer.guide("table", *backward(model, batch))
    optimizer.step()
    assert seen == [pytest.approx(0, abs=1e-6)]


def test_global_step_hooks_fire_for_both(batch):
    model, optimizer = build()
    events = []
    handles = [
        register_optimizer_step_pre_hook(lambda which, *_: events.append(("before", which))),
        register_optimizer_step_post_hook(lambda which, *_: events.append(("after", which))),
    ]
    backward(model, batch)
    optimizer.step()
    for handle in handles:
        handle.remove()
    base = optimizer.base
    assert events == [("before", optimizer), ("before", base), ("after", base), ("after", optimizer)]


def test_state_dict_hooks_fire_and_may_replace_what_is_saved(trained):
    _, optimizer = trained
    events = []
    optimizer.register_state_dict_pre_hook(lambda which: events.append(which))
    optimizer.register_state_dict_post_hook(lambda which, state_dict: events.append(which))
    optimizer.register_state_dict_post_hook(lambda which, state_dict: {**state_dict, "mine": 1})
    state_dict = optimizer.state_dict()
    assert events == [optimizer, optimizer]
    assert set(state_dict) == {"state", "param_groups", "gaal_surgery", "mine"}


def test_load_state_dict_hooks_fire_and_may_replace_what_is_loaded(trained):
    _, optimizer = trained
    replacement = copy.deepcopy(optimizer.state_dict())
    replacement["param_groups"][0]["lr"] = 0.125
    events = []
    optimizer.register_load_state_dict_pre_hook(lambda which, state_dict: events.append(which))
    optimizer.register_load_state_dict_pre_hook(lambda which, state_dict: replacement)
    optimizer.register_load_state_dict_post_hook(lambda which: events.append(which.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == [optimizer, 0.125]


# Closures.


@ALIGN
def test_a_closure_is_evaluated_once_and_may_guide(align, batch):
    model, optimizer = build(align=align)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        features = model.encoders["image"](batch[0]["image"])
        loss = F.cross_entropy(model.head(features), batch[1])
        loss.backward()
        optimizer.guide("table", model.encoders["table"](batch[0]["table"]), batch[1])
        calls.append(loss)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [loss]
    assert optimizer.stats.guides == ("table",)
    backward(twin, batch)
    its_optimizer.guide("table", twin.encoders["table"](batch[0]["table"]), batch[1])
    assert its_optimizer.step(None) is None
    assert_identical(frozen_copy(model, optimizer), frozen_copy(twin, its_optimizer))


def test_an_unguided_closure_returns_its_value(batch):
    model, optimizer = build()
    before = frozen_copy(model)
    assert optimizer.step(closure=lambda: backward(model, batch) and "value") == "value"
    assert not torch.equal(model.head.weight, before[0]["head.weight"])


# Trainers that wrap the optimizer in a shell, whose class inherits ours without running our constructor.


class Task(LightningModule):
    """The user's loop, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = reference.make_model()
        self.guided = []

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(optimizer, GradientAlignedAlternator)
        for _, stats in reference.take_turns(optimizer, self.model, batch, recipe="cached"):
            self.guided.append(stats.guides)

    def configure_optimizers(self):
        optimizer = GradientAlignedAlternator(ADAMW(self.model.parameters()), self.model.head)
        return [optimizer], [lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self):
        return DataLoader(reference.make_batches(4), batch_size=None)


@pytest.fixture
def plainly_trained():
    model, optimizer = build()
    reference.train(optimizer, model, reference.make_batches(4), recipe="cached")
    return model, optimizer


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 under torch 2.15
def test_lightnings_trainer_drives_it(plainly_trained, tmp_path):
    task = Task()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task)
    assert task.guided == [(), *[("image",), ("table",)] * 3, ("image",)]
    assert_identical(task.model.state_dict(), plainly_trained[0].state_dict())


def test_fabrics_optimizer_drives_it(plainly_trained):
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = build()
    shell = fabric.setup_optimizers(optimizer)
    assert isinstance(shell, GradientAlignedAlternator)
    assert shell is not optimizer
    reference.train(shell, model, reference.make_batches(4), recipe="cached")
    assert shell.stats.guides == optimizer.stats.guides == ("image",)
    assert_identical(frozen_copy(model, shell), frozen_copy(*plainly_trained))


# Wrong arguments.


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        closure()
        return super().step()


WRONG_SETTINGS = {
    "fraction_zero": ({"fraction": 0.0}, ValueError, "fraction"),
    "fraction_above_one": ({"fraction": 1.5}, ValueError, "fraction"),
    "fraction_nan": ({"fraction": float("nan")}, ValueError, "fraction"),
    "fraction_text": ({"fraction": "half"}, TypeError, "fraction"),
    "fraction_mapping": ({"fraction": {"image": 0.5, "table": 2}}, ValueError, "fraction"),
    "align": ({"align": "updates"}, ValueError, "align"),
    "guides": ({"guides": "next"}, ValueError, "guides"),
    "max_norm_zero": ({"max_norm": 0.0}, ValueError, "max_norm"),
    "max_norm_nan": ({"max_norm": float("nan")}, ValueError, "max_norm"),
    "loss_fn": ({"loss_fn": "cross_entropy"}, TypeError, "loss_fn"),
    "uncertainty": ({"uncertainty": 3}, TypeError, "uncertainty"),
    "rule": ({"rule": None}, TypeError, "rule"),
    "rule_class": ({"rule": HalfSpace}, TypeError, r"rule.*HalfSpace\(\)"),
    "loss_fn_class": ({"loss_fn": nn.CrossEntropyLoss}, TypeError, r"loss_fn.*CrossEntropyLoss\(\)"),
    "uncertainty_class": ({"uncertainty": nn.Softmax}, TypeError, r"uncertainty.*Softmax\(\)"),
    "lbfgs": ({"inner": lbfgs}, ValueError, "LBFGS"),
    "needs_closure": ({"inner": partial(NeedsClosure, lr=0.1)}, ValueError, "NeedsClosure"),
    "not_an_optimizer": ({"inner": list}, TypeError, "optimizer"),
    "an_optimizer_class": ({"inner": lambda _: torch.optim.SGD}, TypeError, "optimizer"),
    "maximize": ({"inner": partial(SGD, maximize=True), "align": "update"}, ValueError, "maximize"),
}


@pytest.mark.parametrize(("settings", "error", "name"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_a_wrong_setting_is_refused_by_name(settings, error, name):
    with pytest.raises(error, match=name):
        build(**settings)


@pytest.mark.parametrize(
    ("shared", "error"),
    [
        (lambda model: nn.Linear(4, 3), ValueError),
        (lambda model: nn.Sequential(model.head, nn.Linear(3, 3)), ValueError),
        (lambda model: nn.Tanh(), ValueError),
        (lambda model: model.head.weight, TypeError),
        (lambda model: model.head.requires_grad_(False), ValueError),
    ],
    ids=["foreign", "partly_foreign", "no_parameters", "no_module", "frozen"],
)
def test_a_wrong_shared_module_is_refused_by_name(shared, error):
    model = reference.make_model()
    with pytest.raises(error, match="shared"):
        GradientAlignedAlternator(SGD(model.parameters()), shared(model))


def test_a_complex_parameter_is_refused_by_name():
    head = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"shared \(Sequential\).*complex.*1\.weight, 1\.bias"):
        GradientAlignedAlternator(SGD(head.parameters()), head)


def test_maximize_is_followed_by_gradient_alignment(batch):
    """Ascent on the loss and on its guides: both gradients change sign, the guarantee holds."""
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1, maximize=True), fraction=1.0)
    features, target = backward(model, batch)
    before = frozen_copy(model)
    optimizer.guide("table", features, target)
    gradient = model.head.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), before[0]["head.weight"] + 0.1 * gradient)


FEATURES, TARGET = torch.zeros(8, reference.HIDDEN), torch.zeros(8, dtype=torch.long)
WRONG_GUIDES = {
    "modality": ((1, FEATURES, TARGET), TypeError, "modality"),
    "lengths": (("table", FEATURES, TARGET[:7]), ValueError, "length"),
    "no_length": (("table", FEATURES.sum(), TARGET), ValueError, "length"),
    "features": (("table", FEATURES.tolist(), TARGET), TypeError, "features"),
    "target": (("table", FEATURES, TARGET.tolist()), TypeError, "target"),
    "no_fraction": (("audio", FEATURES, TARGET), ValueError, "fraction.*'audio'"),
}


@pytest.mark.parametrize(("arguments", "error", "name"), WRONG_GUIDES.values(), ids=WRONG_GUIDES)
def test_a_wrong_guide_is_refused_by_name_and_recorded_nowhere(arguments, error, name):
    _, optimizer = build(fraction={"image": 0.5, "table": 0.5})
    with pytest.raises(error, match=name):
        optimizer.guide(*arguments)
    assert not optimizer.state_dict()["gaal_surgery"]["guides"]


@pytest.mark.parametrize(
    ("modalities", "error"),
    [((), ValueError), (("image", "image"), ValueError), (("image", 2), TypeError), ((["image", "table"],), TypeError)],
    ids=["none", "twice", "number", "list"],
)
def test_wrong_modalities_are_refused_before_the_round_begins(modalities, error):
    with pytest.raises(error, match="modalities"):
        build()[1].turns(*modalities)


WRONG_STEPS = {
    "features_too_wide": ({}, torch.zeros(8, 7), ValueError, "'table'.*features.*Linear"),
    "features_are_integers": ({}, FEATURES.long(), ValueError, "'table'.*features.*Linear"),
    "loss_not_scalar": ({"loss_fn": partial(F.cross_entropy, reduction="none")}, FEATURES, ValueError, "loss_fn"),
    "uncertainty_shape": ({"uncertainty": lambda logits: logits}, FEATURES, ValueError, "uncertainty"),
}


@ALIGN
@pytest.mark.parametrize(("settings", "features", "error", "name"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_a_step_that_cannot_be_aligned_changes_nothing(settings, features, error, name, align, batch):
    model, optimizer = build(align=align, **settings)
    backward(model, batch)
    optimizer.guide("table", features, TARGET)
    before = frozen_copy(model, optimizer)
    with pytest.raises(error, match=name):
        optimizer.step()
    assert_identical(frozen_copy(model, optimizer), before)
    assert model.training
    assert model.head.training


def raising(gramian):
    raise KeyError("mistake of the rule's own")


WRONG_RULES = {
    "raises": (raising, 1, KeyError, "mistake"),
    "wrong_shape": (lambda gramian: gramian, 1, ValueError, "rule"),
    "too_few": (lambda gramian: gramian[0, :1], 1, ValueError, "rule"),
    "no_tensor": (lambda gramian: gramian[0].tolist(), 1, TypeError, "rule"),
    "too_many_guides": (HalfSpace(), 13, ValueError, "13.*guides='previous'"),
}


@ALIGN
@pytest.mark.parametrize(("rule", "count", "error", "name"), WRONG_RULES.values(), ids=WRONG_RULES)
def test_a_rule_that_fails_changes_nothing(rule, count, error, name, align, batch):
    model, optimizer = build(rule=rule, align=align)
    features, target = backward(model, batch)
    for guide in range(count):
        optimizer.guide(f"guide {guide}", features, target)
    before = frozen_copy(model, optimizer)
    for _ in range(2):  # nor the second time
        with pytest.raises(error, match=name):
            optimizer.step()
        assert_identical(frozen_copy(model, optimizer), before)


class CountsItself:
    """A rule with a state, as a schedule of margins has."""

    def __init__(self):
        self.asked = []

    def __call__(self, gramian):
        self.asked.append(gramian)
        return HalfSpace()(gramian)


def test_update_alignment_tries_a_rule_once_for_each_number_of_guides(batch):
    model, optimizer = build(rule=CountsItself(), align="update")
    for guides in (["table"], ["table"], ["table", "sound"], ["table"]):
        for name in guides:
            optimizer.guide(name, *backward(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    tried = [bool((gramian == torch.eye(len(gramian))).all()) for gramian in optimizer.rule.asked]
    assert tried == [True, False, False, True, False, False]


def test_a_sparse_gradient_is_refused(batch):
    model, optimizer = build(inner=partial(torch.optim.SGD, lr=0.1))
    optimizer.guide("table", *backward(model, batch))
    model.head.weight.grad = model.head.weight.grad.to_sparse()
    before = frozen_copy(model)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert_identical(frozen_copy(model), before)
