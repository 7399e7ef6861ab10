"""The device's two paths against the CPU's: eager without a branch, and Triton's kernels.

The kernels run on a GPU where there is one, else in Triton's interpreter (see conftest.py). The interpreter cuts off
what bfloat16 cannot hold, where a GPU rounds.
"""

import copy
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
from strategies import DTYPES, EVERY_RULE, RULES, bits
from test_meta import HEADS, take_round
from wrapped import ADAMW, ALIGN, DEMANDING, PAPERS, SGD, build

from gaal_surgery import HalfSpace, align, projection, surgery
from gaal_surgery.projection import combine_into, gramian_of, join

try:
    from gaal_surgery import fused
except ImportError:
    fused = None

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy's, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
needs_triton = pytest.mark.skipif(fused is None, reason="needs triton 3.3 or newer: torch 2.7 and newer bring it")
KERNELS = pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)], ids=["eager", "fused"])
# No multiple of a block, less than one, exactly one, nothing; no dimension.
SHAPES = [(33, 70), (7,), (1024,), (0,), (), (1025,)]
MANY = [*[(1 + i % 5, 3) for i in range(30)], (40, 50), (2,)]
WITH_GUIDES = [*((rule, 3) for rule in RULES.values()), (HalfSpace(), 1), (HalfSpace(0.3), 1), (DEMANDING, 1)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-6, torch.float64: 1e-14}


@contextmanager
def as_on_a_device():
    """Nothing is read on the host, though the tensors are a CPU's; a thousand numbers are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_CHUNK_ON_DEVICE", 1000)
        for module in (projection, surgery):
            patch.setattr(module, "on_host", lambda tensor: False)
        yield


def aligned(gradient, guides, rule=PAPERS, *, kernels):
    rows = [[tensor.to(DEVICE) for tensor in row] for row in (gradient, *guides)]
    with as_on_a_device():
        return [tensor.cpu() for tensor in align(rows[0], rows[1:], rule, fused=kernels)]


def draw(count, shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(count)]


def flat(tensors):
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])


def assert_close(actual, expected, tolerance, *scales):
    for tensor, its in zip(actual, expected, strict=True):
        assert (tensor.dtype, tensor.shape) == (its.dtype, its.shape)
    difference = np.linalg.norm(flat(actual) - flat(expected))
    assert difference <= tolerance * max(np.linalg.norm(flat(its)) for its in (expected, *scales))


@KERNELS
class TestAlign:
    @pytest.mark.parametrize("shapes", [SHAPES, MANY, [(3,)]], ids=["uneven", "many", "one"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rule", "count"), WITH_GUIDES)
    def test_as_on_a_cpu(self, rule, count, dtype, shapes, kernels):
        gradient, *guides = draw(1 + count, shapes, dtype)
        guides[0] = [guide - tensor for guide, tensor in zip(guides[0], gradient, strict=True)]
        result = aligned(gradient, guides, rule, kernels=kernels)
        assert_close(result, align(gradient, guides, rule), 2 * TOLERANCE[dtype], gradient)

    @pytest.mark.parametrize("relative", [False, True])
    @pytest.mark.parametrize("lengths", [(1e-20, 1e-20), (1e15, 1e15), (1e-20, 1e15), (1e15, 1e-20), (1.0, 0.0)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_nearest_point_for_gradients_of_any_length(self, dtype, lengths, relative, kernels):
        gradient, guide = draw(2, dtype=torch.float64)
        guide = [one - other for one, other in zip(guide, gradient, strict=True)]
        gradient, guide = (
            [(tensor * (length / np.linalg.norm(flat(row)))).to(dtype) for tensor in row]
            for row, length in zip((gradient, guide), lengths, strict=True)
        )
        g, p = flat(gradient), flat(guide)
        margin = 0.5 * np.linalg.norm(g) * np.linalg.norm(p) if relative else 0
        expected = g + (max(0, margin - g @ p) / (p @ p) * p if p.any() else 0)
        result = aligned(gradient, [guide], HalfSpace(0.5 if relative else 0, relative), kernels=kernels)
        assert np.linalg.norm(flat(result) - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_unchanged_to_the_bit_where_no_guide_objects(self, dtype, kernels):
        (gradient,) = draw(1, dtype=dtype)
        for tensor in gradient:
            tensor.view(-1)[::3] = -0.0
        result = aligned(gradient, [gradient, [2 * tensor for tensor in gradient]], kernels=kernels)
        assert list(map(bits, result)) == list(map(bits, gradient))

    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    @EVERY_RULE
    def test_a_guide_that_is_not_finite_is_ignored(self, rule, value, kernels):
        gradient, guide, bad = draw(3)
        bad[-1][-1] = value
        assert list(map(bits, aligned(gradient, [bad], rule, kernels=kernels))) == list(map(bits, gradient))
        zero = [torch.zeros_like(tensor) for tensor in bad]
        results = [aligned(gradient, [guide, its], rule, kernels=kernels) for its in (bad, zero)]
        assert list(map(bits, results[0])) == list(map(bits, results[1]))

    @pytest.mark.parametrize("rule", [*RULES.values(), lambda gramian: gramian[0] * NAN])
    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_gradient_that_is_not_finite_passes(self, dtype, value, rule, kernels):
        gradient, *guides = draw(3, dtype=dtype)
        gradient[0][-1, -1] = value
        gradient[1][0] = -0.0
        for tensor, its in zip(aligned(gradient, guides, rule, kernels=kernels), gradient, strict=True):
            torch.testing.assert_close(tensor, its, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(tensor.signbit()[its == 0], its.signbit()[its == 0])

    @pytest.mark.parametrize("weights", [[1.0, 0.0, -0.0], [1.0, 0.5, 0.0], [2.0, 0.0, -1.0]])
    def test_a_weight_of_zero_leaves_no_trace(self, weights, kernels):
        gradient, one, other = draw(3, dtype=torch.float16)
        for tensor in gradient:
            tensor.view(-1)[::2] = -0.0

        def rule(gramian):
            return gramian.new_tensor(weights)

        result = aligned(gradient, [one, other], rule, kernels=kernels)
        used = [its for its, weight in zip((one, other), weights[1:], strict=True) if weight]
        alone = aligned(gradient, used, lambda gramian: gramian.new_tensor([w for w in weights if w]), kernels=kernels)
        expected = alone if used else gradient
        assert list(map(bits, result)) == list(map(bits, expected))

    def test_repeats_to_the_bit(self, kernels):
        gradient, *guides = draw(4)
        results = [aligned(gradient, guides, DEMANDING, kernels=kernels) for _ in range(3)]
        assert len({str(list(map(bits, result))) for result in results}) == 1

    def test_compiles_without_a_graph_break(self, kernels):
        torch.compiler.reset()
        gradient, guide = ([tensor.to(DEVICE) for tensor in row] for row in draw(2))
        compiled = torch.compile(align, fullgraph=True, backend="aot_eager")
        result = compiled(gradient, [guide], DEMANDING, fused=kernels)
        assert_close([x.cpu() for x in result], align(*draw(1), [draw(2)[1]], DEMANDING), 1e-6)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_all_products(count, dtype, kernels):
    rows = draw(count, dtype=dtype)
    vectors = np.stack([flat(row) for row in rows])
    with as_on_a_device():
        products = gramian_of(join([[tensor.to(DEVICE) for tensor in row] for row in rows], kernels)).cpu()
    assert products.dtype is torch.float64
    assert torch.equal(products, products.T)
    torch.testing.assert_close(products.numpy(), vectors @ vectors.T, rtol=1e-12, atol=1e-10)


@KERNELS
def test_into_the_first_gradient_contiguous_or_not(kernels):
    gradient, guide = ([torch.randn(50, 30, device=DEVICE).T, torch.randn(9, device=DEVICE)] for _ in range(2))
    expected = [one - 0.5 * other for one, other in zip(gradient, guide, strict=True)]
    storages = [tensor.data_ptr() for tensor in gradient]
    with as_on_a_device():
        weights = torch.tensor([[1.0, NAN], [-0.5, NAN]], dtype=torch.float64, device=DEVICE)[:, 0]
        combine_into(gradient, join([gradient, guide], kernels), weights, exact=False)
    assert [tensor.data_ptr() for tensor in gradient] == storages
    torch.testing.assert_close(gradient, expected)


@ALIGN
@KERNELS
@pytest.mark.parametrize("inner", [SGD, ADAMW])
def test_training_is_that_of_the_cpu(inner, align, kernels):
    modalities = ("image", "table", "audio")
    model, optimizer = build(*modalities, inner=inner, align=align, guides="others", rule=DEMANDING)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    its_optimizer.fused = kernels
    twin.to(DEVICE)
    batches = reference.make_batches(3, *modalities)
    history = reference.train(optimizer, model, batches)
    assert any(history)
    moved = [({name: x.to(DEVICE) for name, x in inputs.items()}, target.to(DEVICE)) for inputs, target in batches]
    with as_on_a_device():
        assert reference.train(its_optimizer, twin, moved) == history
    torch.testing.assert_close([x.cpu() for x in twin.parameters()], list(model.parameters()), rtol=1e-4, atol=1e-5)
    assert its_optimizer.state_dict().keys() == optimizer.state_dict().keys()


@ALIGN
@needs_triton
def test_a_round_on_the_meta_device(align):
    *_, stats = take_round(HEADS["mlp"], rule=HalfSpace(0.1), align=align, fused=True)
    assert stats.weights.is_meta


@needs_triton
def test_the_operators_keep_torchs_contract():
    tensors = [tensor.to(DEVICE) for row in zip(*draw(3), strict=True) for tensor in row]
    products = torch.library.opcheck(fused.inner_products, (tensors, 3))
    weights = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, device=DEVICE)
    outputs = [torch.empty_like(tensor) for tensor in tensors[::3]]
    total = torch.library.opcheck(fused.weighted_sum, (outputs, tensors, weights))
    assert {*products.values(), *total.values()} == {"SUCCESS"}


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gaal_surgery import fused

def compile_(function, constants=(), **signature):
    signature |= {"count": "constexpr", "width": "constexpr"}
    source = ASTSource(function, signature, constexprs={"count": 2, "width": 1024} | dict(constants))
    assert "atom" not in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]

for kinds in (("*fp32", "*fp16"), ("*bf16", "*fp64")):
    tensors = tuple(kind for kind in kinds for _ in range(2))
    for sizes, one in ((("i32", "i64"), False), (("i32", "constexpr"), True)):  # a size of 1 is a constant
        constants = {(1, 1): 1} if one else {}
        compile_(fused._inner_products, constants, tensors=tensors, sizes=sizes, partial="*fp64")
        constants = {(2, 1): 1} if one else {}
        compile_(fused._weighted_sum, constants, outputs=kinds, tensors=tensors, sizes=sizes, weights="*fp64")
"""


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program], env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    result = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@ALIGN
@needs_triton
@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch before 2.8 does not compile the step")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_the_step_compiles(align, batch):
    """But for the breaks that torch's own optimizers make."""
    moved = []
    for compile_ in (lambda step: step, lambda step: torch.compile(step, backend="aot_eager")):
        torch.compiler.reset()
        model, optimizer = build(inner=SGD, align=align, rule=DEMANDING, fused=True)
        model.to(DEVICE)
        inputs, target = batch
        batches = [({name: x.to(DEVICE) for name, x in inputs.items()}, target.to(DEVICE))]
        optimizer.step = compile_(optimizer.step)
        assert any(reference.train(optimizer, model, 3 * batches))
        moved.append(list(model.parameters()))
    torch.testing.assert_close(*moved)


class TestRefused:
    @needs_triton
    def test_on_a_cpu_but_for_the_interpreter(self):
        program = """
import torch
from gaal_surgery import GradientAlignedAlternator, align
try:
    align(torch.ones(3), [-torch.ones(3)], fused=True)
except ValueError as error:
    print(error)
head = torch.nn.Linear(2, 3)
optimizer = GradientAlignedAlternator(torch.optim.SGD(head.parameters(), lr=1), head, fused=True, align="update")
torch.nn.functional.cross_entropy(head(torch.ones(4, 2)), torch.zeros(4).long()).backward()
before = [parameter.clone() for parameter in head.parameters()]
optimizer.guide("other", torch.ones(4, 2), torch.ones(4).long())
try:
    optimizer.step()
except ValueError as error:
    print(error)
assert all(map(torch.equal, before, head.parameters()))
"""
        result = run(program)
        assert result.returncode == 0, result.stderr
        message = "fused=True runs Triton kernels, but the gradients are on a CPU: leave fused=False, or set"
        assert [line.startswith(message) for line in result.stdout.splitlines()] == [True, True]

    def test_without_triton(self, batch, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "gaal_surgery.fused", raising=False)
        message = r"fused=True needs triton 3.3 or newer \(.*\): install it, or leave fused=False"
        with pytest.raises(ImportError, match=message):
            align(torch.ones(3), [torch.ones(3)], fused=True)
        with pytest.raises(ImportError, match=message):
            build(fused=True)
