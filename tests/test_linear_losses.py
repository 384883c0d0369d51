"""Linear layer and cross-entropy in one on the CPU backend: drawn problems, named regimes, edges, and the function
around the kernels. What is cross-entropy's own is in test_losses.py."""

from contextlib import nullcontext
from dataclasses import replace

import accuracy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_loss_problems import LinearLossProblem, Results, composition, make, run, truth, with_garbage
from strategies import DTYPES, GARBAGE, lay_out, lay_out_classes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn
from pyattn import _C

# Around vectors, and over chunks of 252 rows, slabs of 256 features and blocks of 384 classes.
ROWS = ((7,), (2,), (67,), (1,), (), (0,), (257,))
FEATURES = (5, 2, 16, 31, 64, 131, 1, 263, 0)
CLASSES = (3, 7, 16, 131, 383, 389, 2, 1, 1000)
MAX_LOGITS = 2**16
LAYOUTS = ("contiguous", "classes last", "wide rows", "strided", "unaligned", "one row")


@st.composite
def linear_loss_problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> LinearLossProblem:
    """Any problem that the kernels take; ignored rows may hold garbage."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    rows, features, classes = (draw(st.sampled_from(sizes)) for sizes in (ROWS, FEATURES, CLASSES))
    if torch.Size(rows).numel() * classes > MAX_LOGITS:
        classes = 131
    problem = make(
        (*rows, features, classes),
        dtype=dtype,
        seed=draw(st.integers(0, 2**32 - 1)),
        sharpness=draw(st.sampled_from((1.0, 0.01, 30.0))),
        biased=draw(st.booleans()),
        weighted=draw(st.booleans()),
        ignored=draw(st.sampled_from((0.2, 0.0, 1.0))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        ignore_index=draw(st.sampled_from((-100, -1, 0))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 1.0))),
    )
    layouts = LAYOUTS
    if draw(st.booleans()):
        problem, layouts = with_garbage(problem, draw(st.sampled_from(GARBAGE))), LAYOUTS[:-1]
    return replace(
        problem,
        input=lay_out_classes(problem.input, draw(st.sampled_from(layouts))),
        linear_weight=lay_out_classes(problem.linear_weight, draw(st.sampled_from(LAYOUTS))),
        linear_bias=None if problem.linear_bias is None else lay_out(problem.linear_bias, "strided"),
        target=lay_out_classes(problem.target, draw(st.sampled_from(("contiguous", "strided")))),
    )


def assert_bitwise(results: Results, expected: Results, context: object = "") -> None:
    for name, x, x_expected in zip(Results._fields, results, expected, strict=True):
        if x_expected is None:
            assert x is None
            continue
        same = (x == x_expected) | (x.isnan() & x_expected.isnan())
        assert x.shape == x_expected.shape and x.dtype == x_expected.dtype
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ\n{context}"


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_problem(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(linear_loss_problems(dtype))
    accuracy.check_loss(run(problem), with_garbage(problem, 0.0))


@given(problem=linear_loss_problems())
def test_strides_change_no_bit(problem: LinearLossProblem) -> None:
    tensors = {name: getattr(problem, name) for name in ("input", "target", "linear_weight", "linear_bias")}
    contiguous = replace(problem, **{n: None if x is None else x.contiguous() for n, x in tensors.items()})
    assert_bitwise(run(problem), run(contiguous), problem)


SEVERAL_SEGMENTS = (511, 7, 7001)  # of blocks of classes; and three chunks of rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_change_no_bit(dtype: torch.dtype, reduction: str) -> None:
    problem = make(SEVERAL_SEGMENTS, dtype=dtype, biased=True, reduction=reduction, label_smoothing=0.1)
    expected = run(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run(problem)
        torch.set_num_threads(1)
        assert_bitwise(results, expected, problem)


@given(problem=linear_loss_problems())
def test_inference_is_the_forward_of_training(problem: LinearLossProblem) -> None:
    input, linear_weight, target, bias, weight = problem.operands(problem.input.dtype)
    with torch.no_grad(), pyattn.use_backend("cpu"):
        loss = pyattn.linear_cross_entropy(
            input, linear_weight, target, linear_bias=bias, weight=weight, **problem.options
        )
    trained = run(problem)
    assert_bitwise(trained._replace(loss=loss), trained, problem)


REGIMES = {
    "two classes": {"shape": (33, 64, 2)},
    "one class": {"shape": (33, 64, 1)},
    "one row": {"shape": (1, 64, 1000)},
    "one sample": {"shape": (64, 131)},
    "a chunk of rows": {"shape": (252, 32, 48)},
    "one row over a chunk": {"shape": (253, 32, 48)},
    "a block of classes": {"shape": (12, 32, 384)},
    "one class over a block": {"shape": (12, 32, 385)},
    "a slab of features": {"shape": (12, 256, 48)},
    "one feature over a slab": {"shape": (12, 257, 48)},
    "long features": {"shape": (12, 3072, 96)},
    "several segments": {"shape": SEVERAL_SEGMENTS},
    "fewer rows in a chunk": {"shape": (41, 2, 250007), "ignored": 0.0},  # for the sake of memory
    "flat": {"sharpness": 1e-3},
    "peaked": {"sharpness": 100.0},
}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weighted": True, "biased": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, dtype: torch.dtype, options: dict) -> None:
    problem = make(**{"ignored": 0.2} | REGIMES[regime] | options, dtype=dtype)
    accuracy.check_loss(run(problem), problem)


@pytest.mark.skipif(
    _C.isa() != _C.available_isas()[0], reason="torch's kernel has the best instruction set, and may round less by FMA"
)
@pytest.mark.parametrize("shape", [(64, 128, 1000), (300, 768, 500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_torchs_kernels(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The benchmark's gate at two points: pooled over 8 seeds, no more than 1.1 times torch's error."""
    ours, theirs, truths = [], [], []
    for seed in range(8):
        problem = make(shape, dtype=dtype, seed=seed, ignored=0.0)
        problem = replace(problem, dloss=torch.ones_like(problem.dloss))
        ours.append(run(problem))
        theirs.append(run(problem, "torch"))
        truths.append(truth(problem))
    for index, name in enumerate(Results._fields[:-1]):
        accuracy.assert_within_gate(name, *([row[index] for row in rows] for rows in (ours, truths, theirs)))


# ---- edges -----------------------------------------------------------------------------------------------------------


def assert_as_torch(problem: LinearLossProblem) -> None:
    for x, expected in zip(run(problem), run(problem, "torch"), strict=True):
        torch.testing.assert_close(x, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 1), (3, 5)], ids=str)
def test_sizes_at_the_edge(shape: tuple[int, ...], reduction: str) -> None:
    assert_as_torch(make(shape, reduction=reduction, biased=True, ignored=0.0))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(reduction: str, label_smoothing: float) -> None:
    """A mean over nothing is NaN; its gradients are 0."""
    assert_as_torch(make((4, 3, 5), ignored=1.0, reduction=reduction, label_smoothing=label_smoothing, biased=True))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_what_an_ignored_row_holds_reaches_nothing(backend: str, garbage: float) -> None:
    problem = make(ignored=0.3, reduction="sum", biased=True)
    results = run(with_garbage(problem, garbage), backend)
    assert_bitwise(results, run(problem, backend))
    assert not results.dinput[problem.target == -100].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [3, 1000])  # and with a block of classes that are all -inf
def test_logits_of_minus_infinity(classes: int, label_smoothing: float) -> None:
    """By the bias. No probability; as a target, an infinite loss."""
    problem = make((3, 5, classes), ignored=0.0, reduction="none", biased=True, label_smoothing=label_smoothing)
    problem.linear_bias[: classes // 2 + 1] = -torch.inf
    target = torch.tensor([classes - 1, 0, classes - 1])
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    operands = (problem.input, problem.linear_weight, target)
    expected = composition(*operands, linear_bias=problem.linear_bias, **options)
    with pyattn.use_backend("cpu"):
        loss = pyattn.linear_cross_entropy(*operands, linear_bias=problem.linear_bias, **options)
    torch.testing.assert_close(loss, expected)


def test_a_logit_that_is_nan_or_infinite_is_its_rows_alone() -> None:
    problem = make((5, 7, 1000), ignored=0.0, reduction="none")
    problem.input[1, 2], problem.input[3, 0] = torch.nan, torch.inf
    loss, dinput, _, _ = run(problem)
    assert loss.isfinite().tolist() == dinput.isfinite().all(dim=1).tolist() == [True, False, True, False, True]


def test_huge_logits() -> None:
    problem = make(sharpness=1e4)
    accuracy.check_loss(run(problem), problem)


def test_a_sample_ignored_at_all_positions_reaches_nothing() -> None:
    target = torch.tensor([[0, 4], [-100, -100], [-100, 2]])
    x, linear_weight = torch.randn(3, 5), torch.randn(7, 2, 5, requires_grad=True)
    expected = torch.autograd.grad(pyattn.linear_cross_entropy(x, linear_weight, target), linear_weight)
    x[1] = torch.nan
    loss = pyattn.linear_cross_entropy(x, linear_weight, target)
    assert torch.equal(torch.autograd.grad(loss, linear_weight)[0], expected[0])


def test_byte_indices() -> None:
    target = torch.tensor([0, 1, 4, 255], dtype=torch.uint8)
    assert_as_torch(replace(make((4, 3, 5), ignored=0.0), target=target, ignore_index=255))


# ---- gradients that the forward makes --------------------------------------------------------------------------------


def leaves_of(problem: LinearLossProblem) -> tuple[Tensor, Tensor]:
    return problem.input.clone().requires_grad_(), problem.linear_weight.clone().requires_grad_()


def test_second_backward_of_a_graph_that_is_retained() -> None:
    """The forward's gradients went to the first; and what that got is nobody else's."""
    problem = make((100, 3, 120011))  # fewer rows in a chunk than if no logits were kept
    leaves = leaves_of(problem)
    loss = pyattn.linear_cross_entropy(*leaves, problem.target)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    for x, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(x, copy)
        assert torch.equal(again, copy)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_is_not_needed_is_not_made(reduction: str, needed: tuple[bool, bool]) -> None:
    problem = make(reduction=reduction)
    both = run(problem)
    leaves = [x.requires_grad_(need) for x, need in zip(leaves_of(problem), needed, strict=True)]
    with pyattn.use_backend("cpu"):
        loss = pyattn.linear_cross_entropy(*leaves, problem.target, reduction=reduction)
    loss.backward(problem.dloss)
    for leaf, expected in zip(leaves, (both.dinput, both.dlinear_weight), strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)


def test_loss_scaling_keeps_float16_gradients() -> None:
    """Of 1 / (rows * classes) nothing is left in float16; the scale must come before the rounding."""
    problem = make((1021, 16, 131), dtype=torch.float16, ignored=0.0)
    leaves = leaves_of(problem)
    loss = pyattn.linear_cross_entropy(*leaves, problem.target) * 2**-10  # as in the mean over accumulated steps
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(2.0**15, dtype=torch.float16))
    expected = truth(replace(problem, dloss=torch.tensor(32.0)))
    for x, x_ref in zip(gradients, expected[1:], strict=False):
        assert (x.double() - x_ref).norm() <= torch.finfo(torch.float16).eps * x_ref.norm()


def test_an_index_that_goes_bad_before_the_backward() -> None:
    """The backward looks again: it writes where the index says."""
    target = torch.zeros(3, dtype=torch.int64)
    x, linear_weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    with pyattn.use_backend("cpu"):
        loss = pyattn.linear_cross_entropy(x, linear_weight, target, reduction="none")
    target.data[2] = 77  # unseen by autograd's version counter
    with pytest.raises(IndexError, match="got 77 at position 2"):
        loss.sum().backward()


# ---- wrong calls -----------------------------------------------------------------------------------------------------

WRONG = {
    "input of three axes": (
        {"input": torch.ones(2, 4, 3)},
        pyattn.ShapeError,
        r"input: expected shape \(features,\) or \(tokens, features\), got \(2, 4, 3\); input.flatten\(0, -2\)",
    ),
    "features": (
        {"linear_weight": torch.ones(5, 2)},
        pyattn.ShapeError,
        r"linear_weight: expected shape \(classes, features\) .* with features=3 \(from input\), got \(5, 2\)",
    ),
    "positions of one sample": (
        {"input": torch.ones(3), "linear_weight": torch.ones(5, 2, 3)},
        pyattn.ShapeError,
        r"input: expected shape \(tokens, features\), since linear_weight has positions",
    ),
    "bias of another length": (
        {"linear_bias": torch.ones(4)},
        pyattn.ShapeError,
        r"linear_bias: expected linear_weight's shape without features, \(5,\), got \(4,\)",
    ),
    "another dtype": (
        {"linear_weight": torch.ones(5, 3).double()},
        pyattn.DtypeError,
        r"linear_weight: expected input's dtype torch.float32, .*linear_weight.to\(input.dtype\) converts",
    ),
    "target of another length": (
        {"target": torch.zeros(3).long()},
        pyattn.ShapeError,
        r"target: expected shape \(4,\) for class indices, or the logits' \(4, 5\) for class probabilities, got \(3,\)",
    ),
    "weight of another length": ({"weight": torch.ones(4)}, pyattn.ShapeError, r"weight: expected shape \(5,\)"),
    "index": (
        {"target": torch.tensor([0, 1, 5, 0])},
        IndexError,
        r"target: expected class indices in \[0, 5\) or ignore_index=-100, got 5 at position 2",
    ),
    "probabilities with an ignore_index": (
        {"target": torch.rand(4, 5), "ignore_index": -100},
        ValueError,
        "ignore_index: does not apply to class probabilities, got -100",
    ),
    "elsewhere": (
        {"linear_weight": torch.ones(5, 3, device="meta")},
        pyattn.DeviceError,
        "linear_weight: expected input's device",
    ),
    "reduction": ({"reduction": "average"}, TypeError, "reduction: expected .*'mean'.* got 'average'"),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, r"expected a number in \[0, 1\], got 1.5"),
    "options": ({"options": object()}, TypeError, "options: expected None"),
}


@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case: str, backend: str | None) -> None:
    """The same words whoever notices."""
    arguments, error, message = WRONG[case]
    good = {"input": torch.ones(4, 3), "linear_weight": torch.ones(5, 3), "target": torch.zeros(4).long()}
    with nullcontext() if backend is None else pyattn.use_backend(backend), pytest.raises(error, match=message):
        pyattn.linear_cross_entropy(**good | arguments)


# ---- the function ----------------------------------------------------------------------------------------------------


N, V = 60, 1000

TORCHS = {
    "class probabilities": {"target": torch.rand(N, V)},
    "positions": {
        "linear_weight": torch.randn(V, 2, 3),
        "linear_bias": torch.randn(V, 2),
        "target": torch.randint(V, (N, 2)),
    },
    "gradient is asked for": {"weight": torch.rand(V, requires_grad=True), "target": torch.randn(N, V).softmax(1)},
}


@pytest.mark.parametrize("reason", TORCHS)
def test_what_is_torchs_own(reason: str) -> None:
    x, arguments = torch.randn(N, 3), {"linear_weight": torch.randn(V, 3)} | TORCHS[reason]
    explained = pyattn.explain(pyattn.linear_cross_entropy, x, **arguments)
    assert explained.backend == "torch" and reason in explained.reason
    bias = arguments.get("linear_bias")
    logits = F.linear(x, arguments["linear_weight"].flatten(0, -2), None if bias is None else bias.flatten())
    logits = logits.reshape(N, *arguments["linear_weight"].shape[:-1])
    expected = F.cross_entropy(logits, arguments["target"], arguments.get("weight"))
    torch.testing.assert_close(pyattn.linear_cross_entropy(x, **arguments), expected)
    with pyattn.use_backend("cpu"), pytest.raises(NotImplementedError, match=reason):
        pyattn.linear_cross_entropy(x, **arguments)


def test_explain() -> None:
    x, linear_weight, target = torch.randn(N, 3), torch.randn(V, 3), torch.zeros(N, dtype=torch.int64)
    explained = pyattn.explain(pyattn.linear_cross_entropy, x, linear_weight, target)
    assert (explained.op, explained.backend, explained.isa) == ("linear_cross_entropy", "cpu", _C.isa())
    assert set(explained.refusals) == {"torch", "reference"}


def test_a_gpu_is_refused_with_a_way_out() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(NotImplementedError, match=r"has no Triton kernels; pyattn.use_backend\('torch'"),
    ):
        pyattn.linear_cross_entropy(
            torch.randn(N, 3, device="cuda"),
            torch.randn(V, 3, device="cuda"),
            torch.zeros(N, dtype=torch.int64, device="cuda"),
        )


MODULE_OPTIONS = {
    "plain": {},
    "all": {"bias": True, "weight": torch.rand(7), "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1},
    "positions": {"out_features": (2, 3), "bias": True},
}


@pytest.mark.parametrize("case", MODULE_OPTIONS)
def test_module(case: str) -> None:
    """torch's names, constructor and state_dict; beside its own, where this torch has it."""
    options = MODULE_OPTIONS[case]
    ours = pyattn.nn.LinearCrossEntropyLoss(5, 7, **options)
    assert list(ours.state_dict()) == (
        ["weight"] * ("weight" in options) + ["linear.weight"] + ["linear.bias"] * ("bias" in options)
    )
    x, target = torch.randn(4, 5), torch.randint(7, (4, *options.get("out_features", ())))
    logits = ours.linear(x).reshape(4, 7, *options.get("out_features", ()))
    names = ("ignore_index", "reduction", "label_smoothing")
    expected = F.cross_entropy(logits, target, ours.weight, **{n: options[n] for n in names if n in options})
    torch.testing.assert_close(ours(x, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(5, 7, **options)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(theirs(x, target), expected)
        assert repr(ours).replace(" ", "") == repr(theirs).replace(" ", "").replace(",options=None", "")
