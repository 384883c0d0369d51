"""Attention on the CPU backend: drawn problems, named regimes, and what must hold whatever the numbers are."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import accuracy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, Results, make, run
from strategies import DTYPES, GARBAGE, LAYOUTS, lay_out, problems
from torch import Tensor

import pyattn
from pyattn import _C, reference

HALF_OR_SINGLE = (torch.bfloat16, torch.float32)


def assert_bitwise(results: Sequence[Tensor | None], expected: Sequence[Tensor | None], context: object = "") -> None:
    """The same bits, NaN in place; `results` may leave out the last fields of `Results`."""
    assert len(results) == len(expected)
    for name, x, x_expected in zip(Results._fields, results, expected, strict=False):
        if x_expected is None:
            assert x is None
            continue
        same = (x == x_expected) | (x.isnan() & x_expected.isnan())
        assert x.shape == x_expected.shape and x.dtype == x_expected.dtype
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ\n{context}"


# ---- accuracy --------------------------------------------------------------------------------------------------------


by_length = pytest.mark.parametrize("long", [False, True], ids=["short", "long"])


@by_length
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_problem(dtype: torch.dtype, long: bool, data: st.DataObject) -> None:
    problem = data.draw(problems(dtype, long))
    accuracy.check(run(problem), problem)


@by_length
@given(data=st.data())
def test_strides_change_no_bit(long: bool, data: st.DataObject) -> None:
    """Every layout is read where it lies, into the same arithmetic."""
    problem = data.draw(problems(long=long))
    names = ("q", "k", "v", "do", "dlse", "bias", "mask")
    tensors = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    contiguous = replace(problem, **{name: x.contiguous() for name, x in tensors.items()})
    assert_bitwise(run(problem), run(contiguous), problem)


@pytest.mark.parametrize("operand", ["k", "v"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_read_in_place_or_not_change_no_bit(kv_heads: int, operand: str) -> None:
    problem = make((2,), 2, kv_heads, 3, 131, 16, 16)
    strided = replace(problem, **{operand: getattr(problem, operand).repeat_interleave(2, -1)[..., ::2]})
    assert_bitwise(run(strided), run(problem), problem)


@by_length
@given(data=st.data())
def test_threads_change_no_bit(long: bool, data: st.DataObject) -> None:
    problem = data.draw(problems(long=long))
    expected = run(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run(problem)
        torch.set_num_threads(1)
        assert_bitwise(results, expected, problem)


@by_length
@given(data=st.data())
def test_inference_is_the_forward_of_training(long: bool, data: st.DataObject) -> None:
    """Without gradients the call takes another way to the same kernel."""
    problem = data.draw(problems(long=long))
    trained = run(problem)
    with torch.no_grad():
        out, lse = pyattn.attention_with_lse(problem.q, problem.k, problem.v, **problem.options)
        alone = pyattn.attention(problem.q, problem.k, problem.v, **problem.options)
    assert_bitwise((out, lse), trained[:2], problem)
    assert_bitwise((alone,), trained[:1], problem)


REGIMES = {
    "one query, one key": {"q_len": 1, "kv_len": 1},  # softmax is constant: dq and dk are 0
    "decoding": {"q_len": 1, "kv_len": 521},  # too few queries for a tile
    "decoding in whole vectors": {"q_len": 1, "kv_len": 521, "head_dim": 64, "v_dim": 32},  # keys are read in place
    "few queries for many heads": {"q_len": 4, "kv_len": 521, "q_heads": 6, "head_dim": 16, "v_dim": 16},
    "a block of queries": {"q_len": 24, "kv_len": 521, "kv_heads": 2},  # reads all keys, so they are packed on the way
    "a unit of keys": {"q_len": 61, "kv_len": 64},
    "one key over a unit": {"q_len": 61, "kv_len": 65},
    "a block of keys": {"q_len": 17, "kv_len": 256},
    "one key over a block": {"q_len": 17, "kv_len": 257},
    "one key over two blocks": {"q_len": 17, "kv_len": 513},
    "many blocks": {"q_len": 31, "kv_len": 2053},  # sums over keys are long enough to lose digits if done in one run
    "many queries": {"q_len": 1031, "kv_len": 37},  # the same for dk and dv; with lower_right most rows are empty
    "vector remainders": {"head_dim": 29, "v_dim": 43},
    "head_dim 1": {"head_dim": 1, "v_dim": 1},
    "head_dim over every register tile": {"head_dim": 263, "v_dim": 307},
    "values wider than keys": {"head_dim": 5, "v_dim": 167},
    "keys wider than values": {"head_dim": 167, "v_dim": 5},
    "grouped heads": {"q_heads": 12, "kv_heads": 3},
    "one key/value head": {"q_heads": 11, "kv_heads": 1},
    "three batch dimensions": {"batch": (2, 1, 3), "q_len": 5, "kv_len": 7},
    "no batch dimension": {"batch": ()},
    "flat": {"sharpness": 1e-3},  # all weights alike
    "peaked": {"sharpness": 100.0},  # one weight takes all, and the pivot moves with every block
}


@pytest.mark.parametrize("causal", [None, pyattn.Causal("lower_right")], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, dtype: torch.dtype, causal: pyattn.Causal | None) -> None:
    problem = make(**REGIMES[regime], dtype=dtype, causal=causal)
    accuracy.check(run(problem), problem)


@pytest.mark.parametrize("axis", ["batch", "q_heads", "q_len", "kv_len", "head_dim", "v_dim"])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_size_zero(axis: str, dtype: torch.dtype) -> None:
    empty = {"batch": (0,)} if axis == "batch" else {"q_heads": 0, "kv_heads": 0} if axis == "q_heads" else {axis: 0}
    problem = make(**empty, dtype=dtype, dropout_p=0.2)
    problem = replace(problem, bias=torch.randn(problem.scores_shape()[-2:]).to(dtype))
    accuracy.check(run(problem), problem)


@pytest.mark.skipif(
    _C.isa() != _C.available_isas()[0], reason="torch's kernel has the best instruction set, and may round less by FMA"
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_torchs_kernel(dtype: torch.dtype, causal: bool) -> None:
    """The benchmark's gate at one point of its grid: pooled over 8 seeds, no more than 1.1 times torch's error."""
    ours, theirs, truths = [], [], []
    for seed in range(8):
        problem = make((1,), 2, 2, 257, 257, 64, 64, dtype=dtype, seed=seed, causal=pyattn.Causal() if causal else None)
        problem = replace(problem, dlse=None)
        leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        theirs.append((out.detach(), *torch.autograd.grad(out, leaves, problem.do)))
        for results, into in ((run(problem), ours), (accuracy.truth(problem), truths)):
            into.append((results.out, results.dq, results.dk, results.dv))
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        accuracy.assert_within_gate(name, *([row[index] for row in rows] for rows in (ours, truths, theirs)))


BIASES = [(), (1031,), (203, 1), (203, 1031), (2, 1, 1), (3, 1, 1, 1), (3, 1, 1, 1031), (3, 2, 203, 1031)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_bias_that_broadcasts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Up to a million terms of one sign and size, dlse / kv_len: a sum done in one run loses digits, and shows."""
    problem = make((3,), 2, 1, 203, 1031, 5, 3, dtype=dtype, scale=0.0)
    bias = torch.zeros(shape, dtype=dtype)
    problem = replace(problem, bias=bias, do=torch.zeros_like(problem.do), dlse=problem.dlse.abs() + 1.0)
    accuracy.check(run(problem), problem)


def test_float16_scores_beyond_its_range() -> None:
    """q.k reaches 10^6, where float16 ends at 65504: the scores are float32 and nothing becomes NaN."""
    problem = make(dtype=torch.float16, head_dim=64)
    problem = replace(problem, q=problem.q * 400, k=problem.k * 400, scale=1.0)
    results = run(problem)
    assert results.lse.max() > 65504
    accuracy.check(results, problem)


# ---- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_shift_of_the_scores(dtype: torch.dtype) -> None:
    """A constant added to a query's scores moves its lse by that and nothing else."""
    problem = make(dtype=dtype)
    shift = torch.arange(-33, 34).view(67, 1) / 32  # exact in every dtype
    problem = replace(problem, bias=torch.zeros(67, 1, dtype=dtype))
    results = run(replace(problem, bias=shift.to(dtype)))
    accuracy.check(results._replace(lse=results.lse - shift.squeeze(-1)), problem)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
def test_permutation_of_the_keys(dtype: torch.dtype) -> None:
    """Keys have no order: permuted with their values and their mask, they give the same, and permuted gradients."""
    problem = make(dtype=dtype, mask=torch.rand(67, 131, generator=torch.Generator().manual_seed(1)) < 0.7)
    order = torch.randperm(131, generator=torch.Generator().manual_seed(2))
    k, v, mask = problem.k[..., order, :], problem.v[..., order, :], problem.mask[:, order]
    results = run(replace(problem, k=k, v=v, mask=mask))
    back = torch.argsort(order)
    accuracy.check(results._replace(dk=results.dk[..., back, :], dv=results.dv[..., back, :]), problem)


# The first and the last key, and those beside the boundaries of units and blocks of keys.
@pytest.mark.parametrize("key", [0, 63, 64, 255, 256, 511, 512, 516])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_is_copied(dtype: torch.dtype, key: int) -> None:
    """With one key left, its weight is exactly 1: the output is its value, and only its value has a gradient."""
    problem = make(kv_len=517, q_heads=1, dtype=dtype, mask=torch.arange(517) == key)
    problem = replace(problem, dlse=None)
    results = run(problem)
    assert torch.equal(results.out, problem.v[..., [key], :].expand_as(results.out))
    assert (results.dv[..., torch.arange(517) != key, :] == 0).all()
    accuracy.check(results, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["bool mask", "bias", "causal", "padding"])
def test_nothing_to_attend_to(way: str, dtype: torch.dtype) -> None:
    """Output 0, lse -inf, gradients 0, not only near them; the rows of others are as accurate as ever."""
    problem = make(dtype=dtype)
    empty = torch.ones(67, dtype=torch.bool)
    if way == "bool mask":
        empty = torch.arange(67) % 5 == 0
        problem = replace(problem, mask=~empty.unsqueeze(-1))
    elif way == "bias":
        problem = replace(problem, bias=torch.full((67, 1), -torch.inf, dtype=dtype))
    elif way == "causal":
        problem = make(q_len=131, kv_len=67, dtype=dtype, causal=pyattn.Causal("lower_right"))
        empty = torch.arange(131) < 64
    else:
        problem = replace(problem, mask=torch.zeros(131, dtype=torch.bool))
    results = run(problem)
    assert (results.out[..., empty, :] == 0).all() and (results.lse[..., empty] == -torch.inf).all()
    assert (results.dq[..., empty, :] == 0).all()
    if empty.all():
        assert all((x == 0).all() for x in results[3:] if x is not None)
    accuracy.check(results, problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_value(dtype: torch.dtype) -> None:
    """The weights sum to 1, so a value that is the same everywhere comes out, and has no gradient for q and k."""
    problem = make(dtype=dtype, kv_len=517)
    problem = replace(problem, v=torch.full_like(problem.v, 0.75), dlse=None)
    results = run(problem)
    exact = torch.full_like(results.out, 0.75)
    zero = [torch.zeros_like(x).double() for x in (problem.q, problem.k)]
    expected = accuracy.truth(problem)._replace(out=exact.double(), dq=zero[0], dk=zero[1])
    accuracy.check(results, problem, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rest_of_the_batch_changes_no_bit(dtype: torch.dtype) -> None:
    """A sample gives the same bits alone, elsewhere in the batch, in another number of threads."""
    problem = make((5,), 4, 2, 67, 521, dtype=dtype, causal=pyattn.Causal("lower_right"))
    mask = torch.arange(521) < torch.tensor([521, 100, 0, 257, 64]).view(5, 1, 1, 1)
    problem = replace(problem, mask=mask, bias=torch.randn(5, 1, 1, 521, generator=torch.Generator()).to(dtype))
    torch.set_num_threads(2)
    whole = run(problem)
    torch.set_num_threads(1)
    for samples in ([3], [4, 0], [1, 1, 1]):
        parts = {n: getattr(problem, n)[samples] for n in ("q", "k", "v", "do", "dlse", "mask", "bias")}
        assert_bitwise(run(replace(problem, **parts)), [x[samples] for x in whole], samples)
    heads = {n: getattr(problem, n)[:, 2:] for n in ("q", "do", "dlse")}
    heads |= {n: getattr(problem, n)[:, 1:] for n in ("k", "v")}
    part = run(replace(problem, **heads, bias=problem.bias.detach()))
    assert_bitwise(part[:3], [x[:, 2:] for x in whole[:3]], "heads")
    assert_bitwise(part[3:5], [x[:, 1:] for x in whole[3:5]], "heads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_of_a_large_problem(dtype: torch.dtype) -> None:
    """Large enough to be shared out in every direction, and for the backward's long tiles; a bias for all samples and
    heads is one sum over threads."""
    problem = make((3,), 4, 2, 263, 601, 32, 32, dtype=dtype, causal=pyattn.Causal("lower_right"), dropout_p=0.1)
    problem = replace(problem, bias=torch.randn(263, 601, generator=torch.Generator().manual_seed(3)).to(dtype))
    expected = run(problem)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_bitwise(run(problem), expected, f"{threads} threads")


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    """With the identity for values the output is the weights; no weight here is 0 but those dropped."""
    problem = make((2, 3), 4, 2, 29, 131, 5, 131, dtype=dtype, sharpness=0.01, dropout_p=0.3, seed=11)
    problem = replace(problem, v=torch.eye(131, dtype=dtype).expand(2, 3, 2, 131, 131))
    for seed in (0, -1, 2**40 + 3):
        options = problem.options | {"dropout_seed": seed}
        kept = pyattn.attention(problem.q, problem.k, problem.v, **options) != 0
        expected = pyattn.dropout_mask(seed, 0.3, batch=6, q_heads=4, q_len=29, kv_len=131)
        assert torch.equal(kept.flatten(0, 1), expected)
        assert torch.equal(expected, reference.dropout_mask(torch.tensor(seed), 0.3, 6, 4, 29, 131))
        with pyattn.use_backend("reference"):
            assert torch.equal(pyattn.attention(problem.q, problem.k, problem.v, **options) != 0, kept)


def test_dropout_expectation() -> None:
    """4000 masks over one problem: their mean is the undropped output, up to five standard errors."""
    one = make((1,), 1, 1, 3, 11, 5, 2)
    q, k, v = (x.expand(4000, *x.shape[1:]) for x in (one.q, one.k, one.v))
    dropped = pyattn.attention(q, k, v, dropout_p=0.4, dropout_seed=7)
    standard_error = dropped.std(dim=0) / math.sqrt(4000)
    assert ((dropped.mean(dim=0) - pyattn.attention(one.q, one.k, one.v)[0]).abs() < 5 * standard_error).all()


def test_dropout_seeds() -> None:
    """None draws a new seed from torch's generator; an int and a tensor of one value are one seed."""
    p = make()

    def out(seed: int | Tensor | None = None, dropout_p: float = 0.5) -> Tensor:
        return pyattn.attention(p.q, p.k, p.v, dropout_p=dropout_p, dropout_seed=seed)

    torch.manual_seed(0)
    first, second = out(), out()
    torch.manual_seed(0)
    assert torch.equal(out(), first) and not torch.equal(first, second)
    assert torch.equal(out(5), out(torch.tensor(5))) and not torch.equal(out(5), out(6))
    state = torch.get_rng_state()
    out(5), out(dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


# ---- masked positions do not exist -----------------------------------------------------------------------------------

MASKS: dict[str, Callable[[int], dict[str, object]]] = {
    "causal": lambda L: {"causal": pyattn.Causal("lower_right", prefix=3)},
    "bool": lambda L: {"mask": torch.rand(67, 131, generator=torch.Generator().manual_seed(1))[:L] < 0.5},
    "padding": lambda L: {"mask": torch.arange(131) < torch.tensor([70, 131]).view(2, 1, 1, 1)},
    "bias": lambda L: {"bias": torch.where(torch.arange(L).view(L, 1) % 3 == torch.arange(131) % 3, 0.5, -torch.inf)},
}


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("L", [67, 3])
def test_garbage_reaches_only_who_attends(L: int, where: str, mask: str, garbage: float, dtype: torch.dtype) -> None:
    """NaN or infinity in one row: every query that attends to it is lost, and not a bit of any other changes."""
    head_dims = (13, 7) if L == 67 else (16, 16)  # few queries, in whole vectors, read their keys in place
    clean = make((2,), 2, 2, L, 131, *head_dims, dtype=dtype, **MASKS[mask](L))
    if clean.bias is not None:
        clean = replace(clean, bias=clean.bias.to(dtype))
    row = L - 2 if where in ("q", "do") else 99
    dirty = replace(clean, **{where: getattr(clean, where).clone()})
    getattr(clean, where)[1, 0, row] = 0.0
    getattr(dirty, where)[1, 0, row] = 0.0
    getattr(dirty, where)[1, 0, row, -1] = garbage

    attend = clean.attended()
    queries = torch.zeros(attend.shape[:-1], dtype=torch.bool)
    queries[1, 0] = (torch.arange(L) == row) if where in ("q", "do") else attend[1, 0, :, row]
    keys = (attend & queries.unsqueeze(-1)).any(dim=-2)
    results, expected = run(dirty), run(clean)
    for name, rows in (("out", queries), ("dq", queries), ("dk", keys), ("dv", keys)):
        x, x_clean = getattr(results, name), getattr(expected, name)
        untouched = torch.zeros_like(rows) if (name, where) == ("out", "do") else rows
        assert torch.equal(x[~untouched], x_clean[~untouched]), f"{name} of those who do not attend"
    if where != "do":
        assert not results.out[queries].isfinite().any()
    assert not results.dq[queries].isfinite().any()


@pytest.mark.parametrize("operand", ["k", "v"])
@pytest.mark.parametrize(("q_len", "head_dim"), [(5, 3), (2, 16)])
def test_attended_infinity_of_no_weight(q_len: int, head_dim: int, operand: str) -> None:
    """q.k = -inf would give the weight 0 and hide the infinity; the row is lost all the same."""
    problem = make((1,), 1, 1, q_len, 7, head_dim, head_dim)
    problem = replace(problem, q=problem.q.abs())
    getattr(problem, operand)[0, 0, 4, 0] = -torch.inf
    assert not pyattn.attention(problem.q, problem.k, problem.v).isfinite().any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_a_row_lost_by_its_bias_reaches_no_masked_key(bias: float, backend: pyattn._dispatch.BackendName) -> None:
    problem = make((1,), 1, 1, 5, 7, 3, 3, causal=pyattn.Causal("upper_left"))
    problem = replace(problem, bias=torch.zeros(5, 7))
    problem.bias[2, 1] = bias
    with pyattn.use_backend(backend):
        results = run(problem)
    assert not results.out[..., 2, :].isfinite().any()
    for gradient in (results.dk, results.dv):
        assert not gradient[..., :3, :].isfinite().any() and gradient[..., 3:, :].isfinite().all()


# ---- derivative ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [["q"], ["k"], ["v"], ["bias"], ["q", "v"], ["k", "bias"]], ids=" ".join)
def test_gradients_asked_for_one_by_one(wanted: list[str]) -> None:
    problem = make()
    problem = replace(problem, bias=torch.randn(2, 1, 131, generator=torch.Generator().manual_seed(1)))
    inputs = {name: getattr(problem, name).clone() for name in ("q", "k", "v", "bias")}
    for name in wanted:
        inputs[name].requires_grad_()
    out, lse = pyattn.attention_with_lse(inputs["q"], inputs["k"], inputs["v"], bias=inputs["bias"])
    gradients = torch.autograd.grad((out, lse), [inputs[n] for n in wanted], (problem.do, problem.dlse))
    expected = run(problem)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, getattr(expected, f"d{name}")), name


def test_gradient_of_the_lse_alone() -> None:
    problem = make()
    problem = replace(problem, do=torch.zeros_like(problem.do))
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    _, lse = pyattn.attention_with_lse(*leaves)
    gradients = torch.autograd.grad(lse, leaves, problem.dlse)
    assert all(torch.equal(x, x_expected) for x, x_expected in zip(gradients, run(problem)[2:5], strict=True))


def test_backward_twice() -> None:
    """The saved tensors survive a backward, and gradients accumulate."""
    problem = make()
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = pyattn.attention(*leaves)
    out.backward(problem.do, retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    out.backward(problem.do)
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(leaves, once, strict=True))


def test_one_tensor_three_times() -> None:
    x = make(q_heads=1, q_len=37, kv_len=37, head_dim=5, v_dim=5).q.requires_grad_()
    q, k, v = (x.detach().clone().requires_grad_() for _ in range(3))
    pyattn.attention(x, x, x).sum().backward()
    pyattn.attention(q, k, v).sum().backward()
    assert torch.equal(x.grad, q.grad + k.grad + v.grad)


def test_backward_keeps_the_backend_of_its_forward() -> None:
    problem = make()
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with pyattn.use_backend("reference"):
        out = pyattn.attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, problem.do)
    expected = reference.attention_backward(
        problem.do, None, problem.q, problem.k, problem.v, **problem.kernel_arguments
    )
    assert all(torch.equal(x, x_ref) for x, x_ref in zip(gradients, expected[:3], strict=True))


@settings(max_examples=20)
@given(problems())
def test_reference_backend_takes_the_same_problems(problem: Problem) -> None:
    with pyattn.use_backend("reference"):
        accuracy.check(run(problem), problem)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, "one head"])
def test_memory_order_is_the_querys(layout: str) -> None:
    """Axes lie in memory as query's do, so a transposed model stays transposed; contiguous if query is not dense."""
    problem = make()
    q = lay_out(problem.q, layout)
    k, v = (lay_out(x, layout) for x in (problem.k, problem.v))
    same_width = pyattn.attention(q, k, k)
    assert same_width.stride() == torch.empty_like(q).stride()
    out = pyattn.attention(q, k, v)
    order = sorted(range(4), key=lambda axis: -same_width.stride(axis))
    assert out.shape == (2, 2, 67, 7) and out.permute(order).is_contiguous()


LONG = """
import resource, torch, pyattn
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 2, 4099, 8).requires_grad_() for _ in range(3))
mask = torch.arange(4099) < 4000
def call(n):
    out = pyattn.attention(q[..., :n, :], k[..., :n, :], v[..., :n, :], mask=pyattn.Causal() & mask[:n], dropout_p=0.1)
    out.sum().backward()
call(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(4099)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("shape", [(157, 1), (1, 203), (3, 1, 1, 1)])
def test_mask_that_broadcasts(shape: tuple[int, ...]) -> None:
    """To the bit as the same mask written out, whose summary has a view for every unit of keys."""
    problem = make((3,), 2, 2, 157, 203, 8, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6
    written_out = mask.broadcast_to(3, 2, 157, 203).clone()
    assert_bitwise(run(replace(problem, mask=mask)), run(replace(problem, mask=written_out)), f"mask {shape}")


def test_memory_is_linear() -> None:
    """One head's scores would be 67 MB; forward and backward together may add 16 MB to the process."""
    grown_kib = int(subprocess.run([sys.executable, "-c", LONG], check=True, capture_output=True, text=True).stdout)
    assert grown_kib < 16 * 1024
