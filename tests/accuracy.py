"""Close enough: the one place where a test decides it.

Truth is `pyattn.reference` in float64. The yardstick is what a PyTorch user would write, matmul, softmax, matmul, in
the dtype under test and with each operation's own rounding. The largest error of a result may be a small factor times
the yardstick's largest error, plus a floor for problems so small that the yardstick happens to be exact.
"""

import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import bag_problems
import linear_loss_problems
import loss_problems
import lstm_problems
import torch
from bag_problems import BagProblem
from linear_loss_problems import LinearLossProblem
from loss_problems import LossProblem
from lstm_problems import LstmProblem
from problems import Problem, Results
from torch import Tensor

from pyattn import reference
from pyattn._checks import accumulation_dtype

# float32 and float64 have less room than the half types: kernel and yardstick round equally often.
FACTORS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 3.0, torch.float64: 3.0}

# In eps of the dtype, of the largest `magnitude`: rounding each term twice and the sum twice is 2 eps.
FLOOR_EPS = 2.0

# What the benchmarks allow: the pooled error against that of torch's own kernel.
GATE_FACTOR = 1.1


def check(results: Results, problem: Problem, expected: Results | None = None) -> None:
    """Assert that every output and every gradient is as accurate as it must be; `expected` replaces the truth."""
    dtype = problem.q.dtype
    truths = truth(problem) if expected is None else expected
    columns = zip(Results._fields, results, truths, yardstick(problem), magnitude(problem), strict=True)
    for name, x, x_ref, x_pt, size in columns:
        assert (x is None) == (x_ref is None), f"{name}: got {x}, expected {x_ref}\n{problem}"
        if x is None:
            continue
        # The lse alone has seen no operand rounded to a half type: even dbias comes of the stored output.
        finfo = torch.finfo(x.dtype if name == "lse" else dtype)
        # Below its smallest normal number a dtype has a fixed step.
        floor = FLOOR_EPS * finfo.eps * (_largest(size) + finfo.smallest_normal)
        try:
            assert_close(name, x, x_ref, x_pt, factor=FACTORS[dtype], floor=floor)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{problem}") from None


def check_loss(
    results: loss_problems.Results | linear_loss_problems.Results, problem: LossProblem | LinearLossProblem
) -> None:
    """The same for cross-entropy, and for a linear layer with it."""
    judges = linear_loss_problems if isinstance(problem, LinearLossProblem) else loss_problems
    _check(results, problem, problem.input.dtype, judges)


def check_bag(results: bag_problems.Results, problem: BagProblem) -> None:
    """The same for the embedding bag."""
    _check(results, problem, problem.weight.dtype, bag_problems)


def check_lstm(results: lstm_problems.Results, problem: LstmProblem) -> None:
    """The same for the LSTM."""
    _check(results, problem, problem.input.dtype, lstm_problems)


def _check(results: Any, problem: Any, dtype: torch.dtype, judges: ModuleType) -> None:
    """By the truth, the yardstick and the magnitude that the problem's module knows."""
    finfo = torch.finfo(dtype)
    columns = (results, judges.truth(problem), judges.yardstick(problem), judges.magnitude(problem))
    for name, x, x_ref, x_pt, size in zip(results._fields, *columns, strict=True):
        assert (x is None) == (x_ref is None), f"{name}: got {x}, expected {x_ref}\n{problem}"
        if x is None:
            continue
        assert x.dtype == dtype
        floor = FLOOR_EPS * finfo.eps * (_largest(size.nan_to_num(0.0, 0.0, 0.0)) + finfo.smallest_normal)
        try:
            assert_close(name, x, x_ref, x_pt, factor=FACTORS[dtype], floor=floor)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{problem}") from None


def assert_close(name: str, x: Tensor, x_ref: Tensor, x_pt: Tensor, *, factor: float, floor: float) -> None:
    """max |x - x_ref| <= factor * max |x_pt - x_ref| + floor where x_ref is finite; elsewhere x is what x_ref is."""
    assert x.shape == x_ref.shape, f"{name}: expected shape {tuple(x_ref.shape)}, got {tuple(x.shape)}"
    x, x_pt = x.double(), x_pt.double()
    finite = x_ref.isfinite()
    yardstick_error = _largest(torch.where(finite, (x_pt - x_ref).abs(), 0.0))
    assert math.isfinite(yardstick_error), f"{name}: the yardstick has no answer where the truth has one"
    bound = factor * yardstick_error + floor

    alike = (x == x_ref) | (x.isnan() & x_ref.isnan())
    error = torch.where(finite, (x - x_ref).abs(), torch.where(alike, 0.0, torch.inf)).nan_to_num(torch.inf, torch.inf)
    if _largest(error) > bound:
        worst = torch.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: {int((error > bound).sum())} of {error.numel()} elements are off by more than {bound:.3g}, the "
            f"worst at {tuple(map(int, worst))} by {error[worst]:.3g}: "
            f"got {x[worst]:.9g}, truth {x_ref[worst]:.9g}, plain torch {x_pt[worst]:.9g}"
        )


def relative_error(xs: Iterable[Tensor], x_refs: Iterable[Tensor]) -> float:
    """||x - x_ref|| / ||x_ref|| in the Frobenius norm, pooled over several problems' results."""
    squares = torch.zeros(2, dtype=torch.float64)
    for x, x_ref in zip(xs, x_refs, strict=True):
        squares += torch.stack([(x.double() - x_ref).square().sum(), x_ref.double().square().sum()])
    error, size = squares.sqrt().tolist()
    return error / size


def assert_within_gate(
    name: str, xs: Sequence[Tensor], x_refs: Sequence[Tensor], x_pts: Sequence[Tensor], factor: float = GATE_FACTOR
) -> None:
    """The pooled relative error of `xs` is at most `factor` times that of `x_pts`, torch's own kernel."""
    ours, theirs = relative_error(xs, x_refs), relative_error(x_pts, x_refs)
    assert ours <= factor * theirs, f"{name}: relative error {ours:.4g} is over {factor} x torch's {theirs:.4g}"


def truth(problem: Problem) -> Results:
    """The definition, in float64."""
    q, k, v, do, dlse, bias = _in_float64(problem)
    operands = (q, k, v, bias, problem.mask, problem.seed_tensor)
    out, lse = reference.attention_forward(*operands, **problem.kernel_arguments)
    return Results(out, lse, *reference.attention_backward(do, dlse, *operands, **problem.kernel_arguments))


def yardstick(problem: Problem) -> Results:
    """The plain formula in the problem's dtype, its gradients by autograd; the lse in its own dtype, float32 at least.

    Where float16 scores overflow the formula has no answer; then it is computed in float32 and rounded at the end.
    """
    results = _plain_formula(problem, problem.q.dtype)
    if problem.q.dtype in (torch.float32, torch.float64):
        return results
    wide = _plain_formula(problem, torch.float32)
    if not _has_answer(results, problem):
        results = Results(*(None if x is None else x.to(problem.q.dtype) for x in wide))
    return results._replace(lse=wide.lse)


def _has_answer(results: Results, problem: Problem) -> bool:
    infinite = (~problem.attended().any(dim=-1)).sum()  # the log-sum-exp of a query with nothing to attend to
    return sum((~x.isfinite()).sum() for x in results if x is not None) == infinite


def _plain_formula(problem: Problem, dtype: torch.dtype) -> Results:
    q, k, v, do = (x.to(dtype) for x in _without_garbage(problem))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (_per_query_head(x, q) for x in (k, v))
    # Flipped: in float64 the truth is rounded too, and sums in the truth's order would hide what rounding does.
    scores = (q.flip(-1) @ k.flip(-1).mT) * problem.kernel_arguments["scale"]
    if problem.bias is not None:
        # What is -inf here is not attended to; added, it would make NaN of a row that is all -inf.
        leaves.append(problem.bias.masked_fill(problem.bias == -torch.inf, 0.0).requires_grad_())
        scores = (scores + leaves[3]).to(dtype)
    attend = problem.attended()
    seen = attend.any(dim=-1, keepdim=True)
    scores = torch.where(attend | ~seen, scores, -torch.inf)
    weights = torch.where(seen, torch.softmax(scores, dim=-1), 0.0)
    lse = torch.where(seen.squeeze(-1), torch.logsumexp(scores, dim=-1), -torch.inf)
    out = (weights * _keep(problem).to(dtype)).flip(-1) @ v.flip(-2)

    dlse = torch.zeros_like(lse) if problem.dlse is None else problem.dlse.to(dtype)
    dq, dk, dv, *dbias = torch.autograd.grad((out, lse), leaves, (do, dlse))
    return Results(out.detach(), lse.detach(), dq, dk, dv, dbias[0] if dbias else None)


def magnitude(problem: Problem) -> Results:
    """For each result the same sums with every term made positive, in float64: what rounding the terms can disturb.

    This and not |result|: the gradient of a softmax over one key is 0 as the difference of two equal numbers, each of
    which was rounded. A weight is an exponential, so the absolute error of its score, which no dtype computes in less
    than float32, is a relative error of the weight; in the backward so is the error of the lse, which was stored.
    """
    q, k, v, do = (x.double().abs() for x in _without_garbage(problem))
    k_heads, v_heads = (_per_query_head(x, q) for x in (k, v))
    scale, keep = abs(problem.kernel_arguments["scale"]), _keep(problem)
    scores = scale * (q @ k_heads.mT)
    score_eps = torch.finfo(accumulation_dtype(problem.q.dtype)).eps / torch.finfo(problem.q.dtype).eps
    exact = _weights(problem)
    weights = exact * (1.0 + score_eps * scores)
    out = (weights * keep) @ v_heads

    weights = weights + exact * (score_eps * math.log(max(k.shape[-2], 1)))
    dp = keep * (do @ v_heads.mT)
    delta = (weights * dp).sum(dim=-1)
    if problem.dlse is not None:
        delta = delta + problem.dlse.double().abs()
    ds = weights * (dp + delta.unsqueeze(-1))
    return Results(
        out=out,
        lse=torch.logsumexp(scores, dim=-1).clamp(min=1.0),
        dq=scale * (ds @ k_heads),
        dk=_per_kv_head(scale * (ds.mT @ q), k),
        dv=_per_kv_head((weights * keep).mT @ do, v),
        dbias=None if problem.bias is None else ds.sum_to_size(problem.bias.shape),
    )


def _weights(problem: Problem) -> Tensor:
    """The softmax: it is the derivative of the log-sum-exp by a bias of the scores' shape."""
    q, k, v, do, _, bias = _in_float64(problem)
    bias = torch.zeros(()).double() if bias is None else bias
    arguments = problem.kernel_arguments | {"dropout_p": 0.0}
    ones = torch.ones(q.shape[:-1]).double()
    operands = (q, k, v, bias.expand(problem.scores_shape()), problem.mask)
    return reference.attention_backward(torch.zeros_like(do), ones, *operands, **arguments)[3]


def _in_float64(problem: Problem) -> list[Tensor | None]:
    tensors = (problem.q, problem.k, problem.v, problem.do, problem.dlse, problem.bias)
    return [None if x is None else x.double() for x in tensors]


def _without_garbage(problem: Problem) -> list[Tensor]:
    """q, k, v and do with 0 for what is not finite: masked positions may hold anything, and do not exist."""
    return [x.detach().nan_to_num(0.0, 0.0, 0.0) for x in (problem.q, problem.k, problem.v, problem.do)]


def _keep(problem: Problem) -> Tensor:
    """keep / (1 - p) in float64."""
    if problem.dropout_p == 0.0:
        return torch.ones(()).double()
    *batch, q_heads, q_len, kv_len = shape = problem.scores_shape()
    sizes = (math.prod(batch), q_heads, q_len, kv_len)
    keep = reference.dropout_mask(problem.seed_tensor, problem.dropout_p, *sizes).reshape(shape).double()
    return keep / (1.0 - problem.dropout_p) if problem.dropout_p < 1.0 else keep


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(_group(q, x), dim=-3)


def _per_kv_head(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.unflatten(-3, (x.shape[-3], _group(gradient, x))).sum(dim=-3)


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[-3] // k.shape[-3] if k.shape[-3] else 1


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0
