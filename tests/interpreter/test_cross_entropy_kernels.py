"""The Triton kernels of cross-entropy: every result against float64, as the CPU's are judged."""

import accuracy
import pytest
import torch
from loss_problems import LossProblem, Results, make
from strategies import DTYPES

from pyattn._cross_entropy import empty_loss, empty_state
from pyattn.kernels import cross_entropy as kernels


def run(problem: LossProblem) -> Results:
    operands = (problem.input, problem.target, problem.weight)
    loss, m, l = empty_loss(problem.input, problem.reduction), empty_state(problem.input), empty_state(problem.input)
    kernels.cross_entropy_forward(*operands, loss, m, l, **problem.options)
    dinput = torch.empty_like(problem.input)
    kernels.cross_entropy_backward(problem.dloss, m, l, *operands, dinput, **problem.options)
    return Results(loss, dinput)


CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weighted": True},
    "smoothed, weighted": {"label_smoothing": 0.1, "weighted": True, "reduction": "none"},
    "probabilities": {"probabilities": True},
    "probabilities, smoothed, weighted": {"probabilities": True, "label_smoothing": 0.1, "weighted": True},
    "over a block of classes": {"shape": (3, 5003), "label_smoothing": 0.1},
    "peaked": {"sharpness": 100.0, "probabilities": True},
    "positions": {"shape": (2, 5, 3, 4), "weighted": True},
    "no batch": {"shape": (67,)},
    "one class": {"shape": (5, 1)},
    "no rows": {"shape": (0, 5), "reduction": "sum"},
    "all ignored": {"ignored": 1.0},
    "another ignore_index": {"ignore_index": 3, "reduction": "none"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, dtype: torch.dtype) -> None:
    problem = make(**{"shape": (5, 67)} | CASES[case], dtype=dtype)
    accuracy.check_loss(run(problem), problem)


@pytest.mark.parametrize("probabilities", [False, True])
def test_strides_change_no_bit(probabilities: bool) -> None:
    problem = make((3, 7, 5), probabilities=probabilities)
    moved = problem.input.movedim(1, -1).contiguous().movedim(-1, 1)
    results = run(LossProblem(moved, problem.target, problem.dloss))
    assert all(torch.equal(x, y) for x, y in zip(results, run(problem), strict=True))


@pytest.mark.parametrize("bad", [67, -1, 2**40])
def test_an_index_that_is_no_class_is_nan_and_never_an_address(bad: int) -> None:
    """The sanitizer would see a read beyond the logits or the weights."""
    problem = make((5, 67), weighted=True, ignored=0.0, reduction="none")
    problem.target[2] = bad
    loss, dinput = run(problem)
    assert loss.isnan().tolist() == dinput.isnan().any(dim=1).tolist() == [False, False, True, False, False]


def test_minus_infinity() -> None:
    problem = make((3, 5003), ignored=0.0, reduction="none")
    problem.input[0, :4500] = problem.input[1, 7] = -torch.inf
    problem.target.copy_(torch.tensor([4600, 7, 0]))
    accuracy.check_loss(run(problem), problem)
