"""Cross-entropy on the CPU backend: drawn problems, named regimes, edges, and the function around the kernels."""

from contextlib import nullcontext
from dataclasses import replace

import accuracy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_problems import LossProblem, Results, make, run, truth
from strategies import DTYPES, lay_out_classes
from torch import Tensor

import pyattn
from pyattn import _C
from pyattn._cross_entropy import TORCH_LOGITS

HALF_OR_SINGLE = (torch.bfloat16, torch.float32)

# Around vectors of 4 to 16, and over a block of 2048 classes.
CLASSES = (2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 131, 1000, 2047, 2049, 4099, 1)
ROWS = ((2,), (3,), (7,), (17,), (67,), (2, 3), (2, 17), (3, 2, 5), (2, 1, 33), (), (0,), (3, 0))
LAYOUTS = ("contiguous", "classes last", "wide rows", "strided", "unaligned", "one row")


@st.composite
def loss_problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> LossProblem:
    """Any problem that the kernels take."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    rows, classes = draw(st.sampled_from(ROWS)), draw(st.sampled_from(CLASSES))
    problem = make(
        (*rows[:1], classes, *rows[1:]),
        dtype=dtype,
        seed=draw(st.integers(0, 2**32 - 1)),
        sharpness=draw(st.sampled_from((1.0, 0.01, 30.0))),
        probabilities=(probabilities := draw(st.booleans())),
        weighted=draw(st.booleans()),
        ignored=draw(st.sampled_from((0.2, 0.0, 1.0))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        ignore_index=-100 if probabilities else draw(st.sampled_from((-100, -1, 0))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 1.0))),
    )
    if draw(st.booleans()):
        shift = draw(st.sampled_from((1e3, -1e3, 3e4)))
        problem = replace(problem, input=problem.input + shift)
    return replace(
        problem,
        input=lay_out_classes(problem.input, draw(st.sampled_from(LAYOUTS))),
        target=lay_out_classes(problem.target, draw(st.sampled_from(LAYOUTS[:-1]))),
        weight=None if problem.weight is None else lay_out_classes(problem.weight, draw(st.sampled_from(LAYOUTS[:-1]))),
    )


def assert_bitwise(results: Results, expected: Results, context: object = "") -> None:
    for name, x, x_expected in zip(Results._fields, results, expected, strict=True):
        same = (x == x_expected) | (x.isnan() & x_expected.isnan())
        assert x.shape == x_expected.shape and x.dtype == x_expected.dtype
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ\n{context}"


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_problem(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(loss_problems(dtype))
    accuracy.check_loss(run(problem), problem)


@given(problem=loss_problems())
def test_strides_change_no_bit(problem: LossProblem) -> None:
    tensors = {name: getattr(problem, name) for name in ("input", "target", "weight")}
    contiguous = replace(problem, **{n: None if x is None else x.contiguous() for n, x in tensors.items()})
    assert_bitwise(run(problem), run(contiguous), problem)


@given(problem=loss_problems())
def test_threads_change_no_bit(problem: LossProblem) -> None:
    expected = run(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run(problem)
        torch.set_num_threads(1)
        assert_bitwise(results, expected, problem)


@given(problem=loss_problems())
def test_inference_is_the_forward_of_training(problem: LossProblem) -> None:
    with torch.no_grad(), pyattn.use_backend("cpu"):
        loss = pyattn.cross_entropy(problem.input, problem.target, problem.weight, **problem.options)
    trained = run(problem)
    assert_bitwise(trained._replace(loss=loss), trained, problem)


REGIMES = {
    "two classes": {"shape": (33, 2)},
    "one class": {"shape": (33, 1)},  # the loss is 0, and so are the gradients
    "one row": {"shape": (1, 4099)},
    "no batch": {"shape": (131,)},
    "a block of classes": {"shape": (5, 2048)},
    "one class over a block": {"shape": (5, 2049)},
    "many blocks": {"shape": (3, 30522)},  # sums over classes are long enough to lose digits if done in one run
    "many rows": {"shape": (20011, 3)},  # the same for the sum over rows
    "more gradient than is cached": {"shape": (281, 30522), "weighted": True},  # written past the caches
    "positions": {"shape": (2, 21, 17, 13)},
    "flat": {"sharpness": 1e-3},
    "peaked": {"sharpness": 100.0},
}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weighted": True}, {"probabilities": True}], ids=str)
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, dtype: torch.dtype, options: dict) -> None:
    problem = make(**REGIMES[regime] | options, dtype=dtype)
    accuracy.check_loss(run(problem), problem)


@pytest.mark.skipif(
    _C.isa() != _C.available_isas()[0], reason="torch's kernel has the best instruction set, and may round less by FMA"
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_torchs_kernel(dtype: torch.dtype, options: dict) -> None:
    """The benchmark's gate at one point: pooled over 8 seeds, no more than 1.1 times torch's error."""
    ours, theirs, truths = [], [], []
    for seed in range(8):
        problem = make((64, 1000), dtype=dtype, seed=seed, reduction="none", **options)
        leaf = problem.input.clone().requires_grad_()
        loss = F.cross_entropy(leaf, problem.target, **problem.options)
        theirs.append((loss.detach(), *torch.autograd.grad(loss, leaf, problem.dloss)))
        ours.append(run(problem))
        truths.append(truth(problem))
    for index, name in enumerate(Results._fields):
        accuracy.assert_within_gate(name, *([row[index] for row in rows] for rows in (ours, truths, theirs)))


# ---- edges: what torch gives -----------------------------------------------------------------------------------------


def assert_as_torch(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> None:
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    with pyattn.use_backend("cpu"):
        ours = pyattn.cross_entropy(leaves[0], target, weight, **options)
    theirs = F.cross_entropy(leaves[1], target, weight, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    gradients = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (4, 1), (5,)], ids=str)
def test_sizes_at_the_edge(shape: tuple[int, ...], reduction: str) -> None:
    axis = min(len(shape) - 1, 1)
    indices = torch.zeros((*shape[:axis], *shape[axis + 1 :]), dtype=torch.int64)
    assert_as_torch(torch.randn(shape), indices, reduction=reduction)
    assert_as_torch(torch.randn(shape), torch.rand(shape), reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(reduction: str, label_smoothing: float) -> None:
    """A mean over nothing is NaN; its gradients are 0."""
    target = torch.full((4,), 3)
    options = {"ignore_index": 3, "reduction": reduction, "label_smoothing": label_smoothing}
    assert_as_torch(torch.randn(4, 5), target, **options)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_what_an_ignored_row_holds_reaches_nothing(garbage: float) -> None:
    problem = make((7, 33), ignored=0.0)
    target = problem.target.index_fill(0, torch.tensor([1, 5]), -100)
    problem = replace(problem, target=target, reduction="sum")
    results = run(replace(problem, input=problem.input.index_fill(0, torch.tensor([1, 5]), garbage)))
    assert_bitwise(results, run(problem))
    assert not results.dinput[[1, 5]].any()


def test_weights_of_zero_are_nothing_to_divide_by() -> None:
    assert_as_torch(torch.randn(4, 3), torch.tensor([0, 1, -100, 2]), torch.zeros(3))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [3, 5000])  # and with a block of classes that are all -inf
def test_logits_of_minus_infinity(classes: int, label_smoothing: float) -> None:
    """No probability; as a target, an infinite loss. A row of them all, or with a NaN or +inf, is NaN."""
    x = torch.randn(6, classes)
    x[0, 1] = x[1, : classes // 2 + 1] = x[2, 2] = -torch.inf
    x[3] = -torch.inf
    x[4, 0], x[5, 0] = torch.nan, torch.inf
    target = torch.tensor([0, classes - 1, 2, 1, 1, 1])
    assert_as_torch(x, target, reduction="none", label_smoothing=label_smoothing)
    assert_as_torch(x, torch.eye(classes)[target], reduction="none")


def test_huge_logits() -> None:
    """e^1e4 overflows, and so would any sum that is not of differences to the largest."""
    problem = make((17, 131), sharpness=1e4)
    accuracy.check_loss(run(problem), problem)


def test_byte_indices() -> None:
    assert_as_torch(torch.randn(4, 5), torch.tensor([0, 1, 4, 255], dtype=torch.uint8), ignore_index=255)


# ---- invariants ------------------------------------------------------------------------------------------------------


def test_shift_of_the_logits() -> None:
    """A constant added to a row's logits changes nothing; 1/32 steps are exact here."""
    problem = make((67, 131), reduction="none")
    problem = replace(problem, input=(problem.input * 32).round() / 32)
    shift = torch.arange(-33, 34).view(67, 1).float()
    assert_bitwise(run(replace(problem, input=problem.input + shift)), run(problem))


@pytest.mark.parametrize("index", [0, 1, 7, 8, 130])
def test_an_index_is_a_row_of_probabilities(index: int) -> None:
    problem = make((5, 131), ignored=0.0, reduction="none", weighted=True)
    problem = replace(problem, target=torch.full((5,), index))
    one_hot = torch.eye(131)[problem.target]
    accuracy.check_loss(run(replace(problem, target=one_hot)), problem)


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    problem = make((67, 131), reduction="none", label_smoothing=0.1)
    whole = run(problem)
    one = run(replace(problem, input=problem.input[41:42], target=problem.target[41:42], dloss=problem.dloss[41:42]))
    assert_bitwise(one, Results(*(x[41:42] for x in whole)))


# ---- class indices that are none -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [131, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("rows", [67, 1031])  # torch's own call, and the kernels
def test_an_index_out_of_range_is_named_with_its_place(rows: int, bad: int) -> None:
    target = torch.zeros(rows, dtype=torch.int64)
    target[29] = target[31] = bad
    message = rf"target: expected class indices in \[0, 131\) or ignore_index=-100, got {bad} at position 29"
    for input in (torch.randn(rows, 131), torch.randn(rows, 131, requires_grad=True)):
        with pytest.raises(IndexError, match=message):
            pyattn.cross_entropy(input, target)


def test_an_index_that_goes_bad_before_the_backward() -> None:
    """The backward looks again: it writes where the index says."""
    target = torch.zeros(2, 3, dtype=torch.int64)
    with pyattn.use_backend("cpu"):
        loss = pyattn.cross_entropy(torch.randn(2, 5, 3, requires_grad=True), target)
    target.data[1, 2] = 77  # unseen by autograd's version counter
    with pytest.raises(IndexError, match=r"got 77 at position \(1, 2\)"):
        loss.backward()


# ---- wrong calls -----------------------------------------------------------------------------------------------------

WRONG = {
    "input without classes": ({"input": torch.ones(())}, pyattn.ShapeError, r"input: expected shape \(classes,\) or"),
    "input of integers": ({"input": torch.ones(4, 5).long()}, pyattn.DtypeError, "input: expected one of float"),
    "target of another length": (
        {"target": torch.zeros(3).long()},
        pyattn.ShapeError,
        r"target: expected shape \(4,\) for class indices, or input's \(4, 5\) for class probabilities, got \(3,\)",
    ),
    "target of int32": (
        {"target": torch.zeros(4).int()},
        pyattn.DtypeError,
        r"got torch.int32; target.long\(\) converts",
    ),
    "probabilities of integers": (
        {"target": torch.zeros(4, 5).long()},
        pyattn.DtypeError,
        "class probabilities in a floating dtype",
    ),
    "probabilities with an ignore_index": (
        {"target": torch.rand(4, 5), "ignore_index": 1},
        ValueError,
        "ignore_index: does not apply to class probabilities, got 1",
    ),
    "weight of another length": ({"weight": torch.ones(4)}, pyattn.ShapeError, r"weight: expected shape \(5,\)"),
    "weight of another dtype": (
        {"weight": torch.ones(5).double()},
        pyattn.DtypeError,
        r"weight.to\(input.dtype\) converts",
    ),
    "weight elsewhere": (
        {"weight": torch.ones(5, device="meta")},
        pyattn.DeviceError,
        "weight: expected input's device",
    ),
    "reduction": ({"reduction": "average"}, TypeError, "reduction: expected .*'mean'.* got 'average'"),
    "label_smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing: expected a number in \[0, 1\], got 1.5",
    ),
    "a list": ({"input": [1.0]}, TypeError, r"torch.as_tensor\(input\) makes a tensor of it"),
    "sparse": ({"input": torch.ones(4, 5).to_sparse()}, TypeError, r"input: .*to_dense\(\) converts"),
}


@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case: str, backend: str | None) -> None:
    """The same words whoever notices: torch's own call, which small problems go to, or the checks."""
    arguments, error, message = WRONG[case]
    arguments = {"input": torch.ones(4, 5), "target": torch.zeros(4).long()} | arguments
    with nullcontext() if backend is None else pyattn.use_backend(backend), pytest.raises(error, match=message):
        pyattn.cross_entropy(**arguments)


# ---- the function ----------------------------------------------------------------------------------------------------


def test_small_problems_are_torchs_own() -> None:
    target = torch.zeros(8, dtype=torch.int64)
    small = pyattn.explain(pyattn.cross_entropy, torch.randn(8, 2), target)
    assert (small.op, small.backend) == ("cross_entropy", "torch")
    assert f"16 logits: up to {TORCH_LOGITS}" in small.reason
    large = pyattn.explain(pyattn.cross_entropy, torch.randn(8, 10000), target)
    assert (large.backend, large.isa, large.memory) == ("cpu", _C.isa(), "O(rows)")
    assert set(large.refusals) == {"torch", "triton", "reference"}
    with pyattn.use_backend("torch"):
        assert pyattn.explain(pyattn.cross_entropy, torch.randn(8, 10000), target).backend == "torch"
    with pyattn.use_backend("torch"), pytest.raises(NotImplementedError, match="torch: is no backend of attention"):
        pyattn.attention(*torch.randn(3, 1, 1, 2, 4))


def test_gradients_of_target_and_weight_are_torchs() -> None:
    x, t, w = torch.randn(60, 1000), torch.rand(60, 1000, requires_grad=True), torch.rand(1000, requires_grad=True)
    assert "the target's or the weight's gradient" in pyattn.explain(pyattn.cross_entropy, x, t, w).reason
    ours, theirs = (torch.autograd.grad(f(x, t, w), (t, w)) for f in (pyattn.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


def test_probabilities_of_another_dtype_are_torchs() -> None:
    x, t = torch.randn(60, 1000).bfloat16(), torch.rand(60, 1000)
    assert "another dtype" in pyattn.explain(pyattn.cross_entropy, x, t).reason
    assert torch.equal(pyattn.cross_entropy(x, t), F.cross_entropy(x, t))


def test_module() -> None:
    weight = torch.rand(5)
    options = {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
    ours, theirs = pyattn.nn.CrossEntropyLoss(weight, **options), torch.nn.CrossEntropyLoss(weight, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    assert ours.double()(x.double(), target).dtype == torch.float64
    assert repr(ours) == "CrossEntropyLoss(ignore_index=1, reduction='sum', label_smoothing=0.1)"
