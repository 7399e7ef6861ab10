"""``torch.compile`` of the model, of the step, and of the loop's body: same training, no graph for every turn."""

import copy
import inspect
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_identical, frozen_copy
from torch.distributed.checkpoint.state_dict import get_state_dict
from wrapped import ADAMW, ALIGN, DEMANDING, RECIPE, SGD, backward, build

from gaal_surgery import GradientAlignedAlternator

# What torch's compiler says of torch's own code.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    # To make a fake tensor, dynamo looks at the gradient of what torch.func puts in the place of a parameter.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning"),  # inductor
]

in_one_graph = pytest.mark.skipif(
    torch.__version__ < "2.8", reason="torch before 2.8 does not compile the step, which runs as it is between graphs"
)
of_torchs_modules = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="torch before 2.14 does not compile its own containers in place"
)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@contextmanager
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = graphs()
        yield
        assert graphs() == before


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(function, backend="eager"):
    """Without a compiler's backend, which takes long; a break of the graph is an error."""
    return torch.compile(function, backend=backend, fullgraph=True)


# Modules: where the user may put the call of compile.


def replaced(model):
    model.head = compiled(model.head, "aot_eager")
    return model.head


def in_place(model):
    model.head.compile(backend="aot_eager", fullgraph=True)
    return model.head


def in_calls_alone(model):
    head, model.head = model.head, compiled(model.head, "aot_eager")
    return head


def encoders(model):
    for encoder in model.encoders.values():
        encoder.compile(backend="aot_eager", fullgraph=True)
    return model.head


PLACES = pytest.mark.parametrize(
    "place",
    [
        replaced,
        pytest.param(in_place, marks=of_torchs_modules),
        in_calls_alone,
        pytest.param(encoders, marks=of_torchs_modules),
    ],
)


def train_with_compiled(place, *, align="gradient"):
    model = reference.make_model()
    inner = ADAMW(model.parameters())
    return model, GradientAlignedAlternator(inner, place(model), align=align, rule=DEMANDING)


@ALIGN
@RECIPE
@PLACES
def test_a_compiled_module_trains_as_it_does_uncompiled(place, recipe, align, dynamo):
    model, optimizer = train_with_compiled(place, align=align)
    twin, its_optimizer = build(align=align, rule=DEMANDING)
    batches = reference.make_batches(5)
    objected = reference.train(optimizer, model, batches[:2], recipe=recipe)
    assert graphs()
    with no_recompilation():
        objected += reference.train(optimizer, model, batches[2:], recipe=recipe)
    assert any(objected)
    assert reference.train(its_optimizer, twin, batches, recipe=recipe) == objected
    assert_identical([*map(torch.Tensor.detach, model.parameters())], [*map(torch.Tensor.detach, twin.parameters())])
    assert_identical(frozen_copy(optimizer), frozen_copy(its_optimizer))


@PLACES
def test_checkpoints_of_compiled_and_uncompiled_training_are_interchangeable(place, dynamo):
    """The prefix is the model's alone, and torch's distributed checkpoints take it off there too."""
    model, optimizer = train_with_compiled(place)
    twin, its_optimizer = build(rule=DEMANDING)
    for one, which in ((model, optimizer), (twin, its_optimizer)):
        reference.train(which, one, reference.make_batches(2), recipe="cached")
    assert any("_orig_mod" in name for name in model.state_dict()) is (place in (replaced, in_calls_alone))
    assert_identical(get_state_dict(model, optimizer), get_state_dict(twin, its_optimizer))
    for one, other in ((optimizer, its_optimizer), (its_optimizer, optimizer)):
        before = frozen_copy(one)
        one.load_state_dict(copy.deepcopy(other.state_dict()))
        assert_identical(frozen_copy(one), before)


# The step, and what the user compiles together with it.


class PlainSGD(torch.optim.Optimizer):
    """Torch's own optimizers break the graph on purpose; this one has nothing to break it."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


@ALIGN
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("measure_hurt", [False, True])
@in_one_graph
def test_the_aligned_step_compiles_into_one_graph(count, align, measure_hurt, batch, dynamo):
    def run(compile_):
        model, optimizer = build(inner=PlainSGD, align=align, rule=DEMANDING, measure_hurt=measure_hurt)
        step = compile_(optimizer.step)
        for _ in range(3):
            evidence = backward(model, batch)
            for guide in ("table", "audio")[:count]:
                optimizer.guide(guide, *evidence)
            step()
            optimizer.zero_grad()
            assert len(optimizer.stats.guides) == count
        return model.state_dict(), list(optimizer.stats.hurt_after.values())

    torch.testing.assert_close(run(compiled), run(lambda step: step))


@ALIGN
@in_one_graph
def test_the_only_graph_breaks_are_those_of_torchs_own_optimizers(align, batch, dynamo):
    model, optimizer = build(inner=SGD, align=align)
    optimizer.guide("table", *backward(model, batch))
    explanation = dynamo.explain(lambda: optimizer.step())()
    breaks = [reason.user_stack[-1].filename for reason in explanation.break_reasons]
    assert optimizer.stats.guides == ("table",)
    assert breaks
    assert set(breaks) == {inspect.getfile(torch.optim.Optimizer)}


def forward(model, modality, inputs, target):
    features = model.encoders[modality](inputs[modality])
    return features, F.cross_entropy(model.head(features), target)


def guide_and_step(optimizer, model, turn, inputs, target, recipe):
    if recipe == "fresh":
        for guide in turn.guides:
            with torch.no_grad():
                optimizer.guide(guide, model.encoders[guide](inputs[guide]), target)
    optimizer.step()


def train(optimizer, model, batches, *, recipe="fresh", forward=forward, guide_and_step=guide_and_step):
    """The user's loop, whose parts may be compiled; the learning rate, a tensor, changes after every round."""
    history = []
    for inputs, target in batches:
        for turn in optimizer.turns(*inputs):
            features, loss = forward(model, turn.modality, inputs, target)
            loss.backward()
            guide_and_step(optimizer, model, turn, inputs, target, recipe)
            history.append([bool(flag) for flag in optimizer.stats.intervened.values()])
            if recipe == "cached":
                optimizer.guide(turn.modality, features, target)
            optimizer.zero_grad()
        optimizer.param_groups[0]["lr"].mul_(0.9)
    return history


def assert_trained_alike(one, other):
    torch.testing.assert_close([*one.parameters()], [*other.parameters()])


@pytest.mark.parametrize(
    ("guides", "recipe", "align"),
    [
        ("previous", "fresh", "gradient"),
        ("previous", "cached", "update"),
        ("others", "fresh", "update"),
    ],
)
@in_one_graph
def test_the_step_is_one_graph_a_modality_however_long_training_lasts(guides, recipe, align, dynamo):
    modalities = ("image", "table", "audio")
    inner = partial(PlainSGD, lr=torch.tensor(0.1))
    model, optimizer = build(*modalities, inner=inner, guides=guides, align=align, rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    batches = reference.make_batches(8, *modalities)
    loop = partial(train, optimizer, model, recipe=recipe, guide_and_step=compiled(guide_and_step))
    history = loop(batches[:2])
    assert graphs() <= 2 * len(modalities)  # the first cached round has fewer guides
    with no_recompilation():
        history += loop(batches[2:])
    assert train(its_optimizer, twin, batches, recipe=recipe) == history
    assert sum(map(any, history[6:]))
    assert_trained_alike(model, twin)


@pytest.mark.parametrize(
    ("inner", "align"),
    [(partial(SGD, lr=0.1), "gradient"), (partial(ADAMW, lr=0.01), "update")],
    ids=["sgd_momentum", "adamw"],
)
@in_one_graph
def test_around_torchs_own_optimizers_nothing_is_compiled_again(inner, align, dynamo):
    """Their breaks are theirs: the only reason that dynamo counts."""
    inner = partial(inner, lr=torch.tensor(inner.keywords["lr"]))
    model, optimizer = build(inner=inner, align=align, rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    batches = reference.make_batches(6)
    loop = partial(train, optimizer, model, guide_and_step=torch.compile(guide_and_step, backend="eager"))
    history = loop(batches[:2])
    with no_recompilation():
        history += loop(batches[2:])
    (reason,) = dynamo.utils.counters["graph_break"]
    assert "torch._dynamo.graph_break()" in reason
    assert train(its_optimizer, twin, batches) == history
    assert any(map(any, history))
    assert_trained_alike(model, twin)


@in_one_graph
def test_a_whole_turn_may_be_compiled(dynamo):
    """Breaks at the backward pass, which dynamo leaves to autograd, do not make it compile again."""
    model, optimizer = build(inner=partial(PlainSGD, lr=torch.tensor(0.1)), rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    batches = reference.make_batches(5)

    def turn_of(optimizer, model, turn, inputs, target):
        forward(model, turn.modality, inputs, target)[1].backward()
        guide_and_step(optimizer, model, turn, inputs, target, "fresh")

    def run(optimizer, model, batches, body):
        for inputs, target in batches:
            for turn in optimizer.turns(*inputs):
                body(optimizer, model, turn, inputs, target)
                optimizer.zero_grad()

    body = torch.compile(turn_of, backend="eager")
    run(optimizer, model, batches[:2], body)
    with no_recompilation():
        run(optimizer, model, batches[2:], body)
    (reason,) = dynamo.utils.counters["graph_break"]
    assert "Tensor.backward()" in reason
    assert optimizer.stats.guides == ("image",)
    run(its_optimizer, twin, batches, turn_of)
    assert_trained_alike(model, twin)


@in_one_graph
def test_compiled_code_computes_the_same(dynamo):
    backend = "inductor" if shutil.which("c++") or shutil.which("g++") else "aot_eager"
    model, optimizer = build(inner=partial(PlainSGD, lr=torch.tensor(0.1)), align="update", rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    batches = reference.make_batches(3)
    parts = [compiled(part, backend) for part in (forward, guide_and_step)]
    history = train(optimizer, model, batches, forward=parts[0], guide_and_step=parts[1])
    assert any(map(any, history))
    assert train(its_optimizer, twin, batches) == history
    assert_trained_alike(model, twin)


@pytest.mark.skipif(torch.__version__ >= "2.8", reason="torch 2.8 and newer compile the step")
@ALIGN
def test_where_the_step_cannot_be_compiled_it_runs_as_it_is(align, dynamo):
    inner = partial(PlainSGD, lr=torch.tensor(0.1))
    model, optimizer = build(inner=inner, align=align, rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    batches = reference.make_batches(4)
    history = train(optimizer, model, batches, guide_and_step=torch.compile(guide_and_step, backend="eager"))
    assert graphs()
    assert train(its_optimizer, twin, batches) == history
    assert any(map(any, history))
    assert_trained_alike(model, twin)
