"""torch's own database of optimizers and their settings drives the wrapper."""

import copy
import io
from dataclasses import dataclass

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_identical, frozen_copy
from torch import nn
from torch.testing._internal.common_optimizers import optim_db
from wrapped import ALIGN, flat, guide_of

from gaal_surgery import GradientAlignedAlternator, HalfSpace

NEVER_OBJECTS = HalfSpace(margin=-1e9)


@dataclass(frozen=True)
class Setting:
    """An optimizer of the database with the options of one of its entries, in one implementation."""

    optimizer: type[torch.optim.Optimizer]
    options: dict

    def __call__(self, parameters):
        return self.optimizer(parameters, **copy.deepcopy(self.options))

    def model(self):
        """What the optimizer can train: Muon takes matrices alone, SparseAdam sparse gradients."""
        model = reference.make_model(head=lambda: nn.Linear(reference.HIDDEN, 3))
        if self.optimizer.__name__ == "Muon":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.bias = None
        return model


def settings():
    """By name, for every entry and every implementation."""
    found = {}
    for info in optim_db:
        if info.optim_cls in (torch.optim.LBFGS, torch.optim.SparseAdam):
            continue
        for entry in info.optim_inputs_func(device="cpu"):
            # "differentiable" refuses leaves, which is what parameters that train are.
            implementations = [name for name in info.supported_impls if name != "differentiable"]
            for flags in ({}, *({name: True} for name in implementations)):
                if info.optim_cls is torch.optim.SGD and "fused" in flags and entry.kwargs.get("momentum"):
                    continue  # torch's own kernel fails where a parameter has no gradient: docs/limits.md
                name = "-".join([info.optim_cls.__name__, entry.desc.replace(" ", "_"), *flags])
                found[name] = Setting(info.optim_cls, {**entry.kwargs, **flags})
    return found


SETTINGS = settings()
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def test_the_database_is_the_one_expected():
    names = {setting.optimizer.__name__ for setting in SETTINGS.values()}
    assert names >= {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Rprop", "ASGD", "Adadelta"}
    assert len(SETTINGS) > 100


def wrap(setting, **options):
    model = setting.model()
    return model, GradientAlignedAlternator(setting(model.parameters()), model.head, **options)


def backward(model, batch, modality):
    features = model.encoders[modality](batch[0][modality])
    F.cross_entropy(model.head(features), batch[1]).backward()


def train(stepping, model, batches, *, guide=False):
    """Rounds, with the wrapper or with the bare optimizer, whose turns are those of the wrapper."""
    for batch in batches:
        wraps = isinstance(stepping, GradientAlignedAlternator)
        for turn in stepping.turns("image", "table") if wraps else ("image", "table"):
            backward(model, batch, turn.modality if wraps else turn)
            if wraps and guide:
                other = turn.guides[0]
                stepping.guide(other, model.encoders[other](batch[0][other]), batch[1])
            stepping.step()
            stepping.zero_grad()


@EVERY_SETTING
def test_unguided_it_is_the_bare_optimizer(setting):
    model, optimizer = wrap(setting)
    twin = copy.deepcopy(model)
    bare = setting(twin.parameters())
    batches = reference.make_batches(3)
    train(optimizer, model, batches)
    train(bare, twin, batches)
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@EVERY_SETTING
@ALIGN
def test_guided_and_not_objected_to_it_is_the_bare_optimizer(setting, align):
    if setting.options.get("maximize") and align == "update":
        with pytest.raises(ValueError, match="maximize"):
            wrap(setting, align=align)
        return
    model, optimizer = wrap(setting, align=align, rule=NEVER_OBJECTS)
    twin = copy.deepcopy(model)
    bare = setting(twin.parameters())
    batches = reference.make_batches(2)
    train(optimizer, model, batches, guide=True)
    assert optimizer.stats.guides == ("image",)
    train(bare, twin, batches)
    assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, bare))


@EVERY_SETTING
def test_update_alignment_holds_for_the_step_really_taken(setting):
    if setting.options.get("maximize"):
        return  # refused, which is tested above
    model = setting.model().double()  # the rounding of float32 weights is not small beside the shortest of steps
    optimizer = GradientAlignedAlternator(setting(model.parameters()), model.head, align="update")
    for batch in reference.make_batches(3, dtype=torch.float64):
        turns = reference.take_turns(optimizer, model, batch)
        for guide in ("table", "image"):
            wanted, before = guide_of(model, batch, guide), copy.deepcopy(model.head.state_dict())
            next(turns)
            step = flat(before, wanted) - flat(model.head.state_dict(), wanted)
            product = float(step @ flat(wanted, wanted))
            assert product >= -1e-8 * float(step.norm() * flat(wanted, wanted).norm())


@EVERY_SETTING
def test_checkpoints_pass_between_the_wrapper_and_the_bare_optimizer(setting):
    model, optimizer = wrap(setting)
    batches = reference.make_batches(4)
    train(optimizer, model, batches[:2], guide=True)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(optimizer, model, batches[2:])

    def resumed(wrapped):
        twin = setting.model()
        stepping = setting(twin.parameters())
        stepping = GradientAlignedAlternator(stepping, twin.head) if wrapped else stepping
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        twin.load_state_dict(weights)
        stepping.load_state_dict(state)
        return twin, stepping

    for wrapped in (True, False):
        twin, stepping = resumed(wrapped)
        train(stepping, twin, batches[2:])
        state = stepping.base if wrapped else stepping
        assert_identical(frozen_copy(model, optimizer.base), frozen_copy(twin, state))
    twin, stepping = resumed(wrapped=True)
    bare = setting(twin.parameters())
    bare.load_state_dict(optimizer.base.state_dict())
    stepping.load_state_dict(bare.state_dict())  # a checkpoint that knows nothing of guides
    assert stepping.state_dict()["gaal_surgery"] == {"turns_begun": 0, "guides": {}}


@EVERY_SETTING
def test_hooks_fire_around_the_step_and_groups_are_added(setting):
    model = setting.model()
    inner = setting(model.head.parameters())
    optimizer = GradientAlignedAlternator(inner, model.head)
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    inner.register_step_pre_hook(lambda *_: events.append("inner"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))
    group = {"params": [*model.encoders.parameters()], "lr": inner.param_groups[0]["lr"]}
    if setting.optimizer is torch.optim.Adagrad and torch.__version__ < "2.13":
        with pytest.raises(KeyError, match="sum"):  # torch's own: its Adagrad makes no state for an added group
            stepped_with(optimizer, group, model)
        return
    before = frozen_copy(model.encoders)
    stepped_with(optimizer, group, model)
    assert events == ["before", "inner", "after"]
    assert len(inner.param_groups) == 2
    frozen = float(inner.param_groups[1]["lr"]) == 0
    assert frozen or not torch.equal(model.encoders["image"][0].weight, before[0]["image.0.weight"])


def stepped_with(optimizer, group, model):
    optimizer.add_param_group(group)
    backward(model, reference.make_batches(1)[0], "image")
    optimizer.step()


def test_an_optimizer_that_needs_its_closure_again_is_refused():
    head = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="LBFGS"):
        GradientAlignedAlternator(torch.optim.LBFGS(head.parameters()), head)


def test_sparse_gradients_step_unguided_and_are_refused_by_name_when_guided():
    head = nn.EmbeddingBag(7, 3, sparse=True)
    twin = copy.deepcopy(head)
    optimizer = GradientAlignedAlternator(torch.optim.SparseAdam(list(head.parameters())), head)
    bare = torch.optim.SparseAdam(list(twin.parameters()))
    rows, target = torch.arange(8).view(4, 2) % 7, torch.arange(4) % 3
    for module, stepping in ((head, optimizer), (twin, bare)):
        F.cross_entropy(module(rows), target).backward()
        stepping.step()
    assert_identical(frozen_copy(head, optimizer.base), frozen_copy(twin, bare))
    optimizer.guide("other", rows, target)
    with pytest.raises(ValueError, match=r"shared has a sparse gradient \(weight\)"):
        optimizer.step()
    assert_identical(frozen_copy(head, optimizer.base), frozen_copy(twin, bare))
