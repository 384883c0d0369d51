"""The embedding bag on the CPU backend: drawn problems, named regimes, edges, and the function around the kernels."""

from dataclasses import replace

import accuracy
import pytest
import torch
import torch.nn.functional as F
from bag_problems import BagProblem, Results, make, run, truth
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, lay_out
from torch import Tensor

import pyattn
from pyattn import _C, reference

# Around vectors of 2 to 16 and blocks of 2, 4 and 8 of them.
FEATURES = (2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 64, 67, 131, 259, 1, 0)
LAYOUTS = ("contiguous", "columns", "wide rows", "strided", "unaligned", "one row")
MODES = ("sum", "mean", "max")


def lay_out_matrix(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in memory of another layout; "one row" repeats the first."""
    if layout == "columns" and x.dim() == 2:
        return x.mT.contiguous().mT
    if layout == "one row" and x.dim() == 2:
        return x[:1].expand_as(x)
    if x.is_floating_point() or layout in ("wide rows", "strided"):
        return lay_out(x, layout)
    return x.contiguous()


@st.composite
def bag_problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> BagProblem:
    """Any problem that the kernels take."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    mode = draw(st.sampled_from(MODES))
    ragged = draw(st.sampled_from(("", "offsets", "last offset")))
    extras = ["mask"] + (["lengths"] if not ragged else []) + (["weighted"] if mode != "max" else [])
    vocabulary = draw(st.sampled_from((5, 2, 41, 2053, 1)))
    problem = make(
        draw(st.sampled_from((3, 1, 2, 7, 19, 0))),
        draw(st.sampled_from((5, 2, 11, 67, 131, 1, 0))),
        vocabulary,
        draw(st.sampled_from(FEATURES)),
        dtype=dtype,
        ids=draw(st.sampled_from((torch.int64, torch.int32))),
        seed=draw(st.integers(0, 2**32 - 1)),
        form=[ragged, *draw(st.sets(st.sampled_from(extras)))],
        mode=mode,
        padding_idx=draw(st.none() | st.integers(0, vocabulary - 1)),
        scale_grad_by_freq=mode != "max" and draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3, 0.9, 1.0))),
    )
    if draw(st.booleans()):
        problem = with_garbage(problem, draw(st.sampled_from((torch.nan, torch.inf, -torch.inf))))
    names = ("weight", "input", "dout", "offsets", "per_sample_weights", "mask", "lengths")
    given = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    kept = ("weight", "dout")  # one id, mask or weight for all rows would be another problem
    return replace(
        problem,
        **{
            name: lay_out_matrix(x, draw(st.sampled_from(LAYOUTS if name in kept[1:] else LAYOUTS[:-1])))
            for name, x in given.items()
        },
    )


def with_garbage(problem: BagProblem, garbage: float) -> BagProblem:
    """`garbage` in the rows that no token that counts names, and impossible ids for the tokens masked out."""
    ones = replace(problem, weight=torch.ones_like(problem.weight), dout=torch.ones_like(problem.dout), mode="sum")
    ones = replace(ones, per_sample_weights=None, scale_grad_by_freq=False)
    named = truth(ones).dweight[:, :1] != 0
    problem = replace(problem, weight=torch.where(named, problem.weight, garbage))
    if problem.mask is not None:
        problem = replace(problem, input=torch.where(problem.mask, problem.input, -7))
    return problem


def assert_bitwise(results: Results, expected: Results, context: object = "") -> None:
    for name, x, x_expected in zip(Results._fields, results, expected, strict=True):
        assert (x is None) == (x_expected is None)
        if x is None or x_expected is None:
            continue
        same = (x == x_expected) | (x.isnan() & x_expected.isnan())
        assert x.shape == x_expected.shape and x.dtype == x_expected.dtype
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ\n{context}"


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_problem(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(bag_problems(dtype))
    accuracy.check_bag(run(problem), problem)


@given(problem=bag_problems())
def test_strides_change_no_bit(problem: BagProblem) -> None:
    names = ("weight", "input", "dout", "offsets", "per_sample_weights", "mask", "lengths")
    tensors = {name: getattr(problem, name) for name in names}
    contiguous = replace(problem, **{n: None if x is None else x.contiguous() for n, x in tensors.items()})
    assert_bitwise(run(problem), run(contiguous), problem)


@given(problem=bag_problems())
def test_sparse_is_dense(problem: BagProblem) -> None:
    """Bit for bit, and coalesced: each row once, in order; and no row that no token names."""
    dense, sparse = run(problem), run(problem, sparse=True)
    gradient = sparse.dweight
    assert gradient.is_sparse and gradient.is_coalesced()
    rows = gradient.indices()[0]
    assert (rows[1:] > rows[:-1]).all() and torch.isin(rows, problem.input).all()
    rebuilt = torch.zeros_like(dense.dweight).index_copy(0, rows, gradient.values())
    assert_bitwise(sparse._replace(dweight=rebuilt), dense, problem)


def assert_threads_change_no_bit(problem: BagProblem) -> None:
    expected = run(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run(problem)
        torch.set_num_threads(1)
        assert_bitwise(results, expected, problem)


@given(problem=bag_problems())
def test_threads_change_no_bit(problem: BagProblem) -> None:
    assert_threads_change_no_bit(problem)


@pytest.mark.parametrize("form", [(), ("weighted", "mask", "offsets")], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_threads_change_no_bit_where_there_is_work_for_all(mode: str, form: tuple[str, ...]) -> None:
    form = tuple(x for x in form if mode != "max" or x != "weighted")
    assert_threads_change_no_bit(make(131, 67, 3001, 67, mode=mode, form=form))


REGIMES = {
    "one long bag": {
        "bags": 1,
        "tokens": 20011,
        "vocabulary": 41,
    },  # long enough to lose digits in one run
    "one row for all": {"bags": 2053, "tokens": 11, "vocabulary": 1},  # the same for the sum over bags
    "one token": {"tokens": 1},
    "one digit of a row's number": {"vocabulary": 2048},
    "two digits": {"vocabulary": 2049},
    "three digits": {"vocabulary": 2**22 + 1, "features": 1},
    "more than a chunk of bags": {"bags": 67, "tokens": 31, "features": 131},
    "wide": {"features": 1031},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, mode: str, dtype: torch.dtype) -> None:
    problem = make(**REGIMES[regime], dtype=dtype, mode=mode)
    accuracy.check_bag(run(problem), problem)


@pytest.mark.skipif(
    _C.isa() != _C.available_isas()[0], reason="torch's kernel has the best instruction set, and may round less by FMA"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_error_is_that_of_torchs_kernel(mode: str, dtype: torch.dtype) -> None:
    """The benchmark's gate at one point: pooled over 8 seeds, no more than 1.1 times torch's error."""
    ours, theirs, truths = [], [], []
    for seed in range(8):
        problem = make(131, 67, 41, 67, dtype=dtype, mode=mode, seed=seed)
        leaf = problem.weight.clone().requires_grad_()
        out = F.embedding_bag(problem.input, leaf, mode=mode)
        theirs.append((out.detach(), *torch.autograd.grad(out, leaf, problem.dout)))
        ours.append(run(problem))
        truths.append(truth(problem))
    for index, name in enumerate(("out", "dweight")):
        accuracy.assert_within_gate(name, *([row[index] for row in rows] for rows in (ours, truths, theirs)))


# ---- what torch gives ------------------------------------------------------------------------------------------------

AS_TORCH = {
    "padded": {"padding_idx": 3},
    "padding from the end": {"padding_idx": -2},
    "offsets": {"form": ("offsets",)},
    "last offset": {"form": ("last offset",), "padding_idx": 0},
    "weighted": {"form": ("weighted",), "padding_idx": 5},
    "int32": {"ids": torch.int32, "form": ("offsets",)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", AS_TORCH)
def test_as_torch(case: str, mode: str) -> None:
    if case == "weighted" and mode != "sum":
        pytest.skip("torch defines it for no other mode")
    problem = make(**AS_TORCH[case], mode=mode)
    ours = run(problem if (problem.padding_idx or 0) >= 0 else replace(problem, padding_idx=41 + problem.padding_idx))
    leaf = problem.weight.clone().requires_grad_()
    names = ("mode", "padding_idx", "include_last_offset")
    options = {name: getattr(problem, name) for name in names}
    theirs = F.embedding_bag(
        problem.input, leaf, problem.offsets, per_sample_weights=problem.per_sample_weights, **options
    )
    torch.testing.assert_close(ours.out, theirs)
    torch.testing.assert_close(ours.dweight, torch.autograd.grad(theirs, leaf, problem.dout)[0])
    again = pyattn.embedding_bag(
        problem.input, leaf, problem.offsets, per_sample_weights=problem.per_sample_weights, **options
    )
    assert torch.equal(again, ours.out)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_frequency_is_that_of_torchs_embedding(mode: str) -> None:
    """Not that of its bag, which divides by the count of another row (CPU, 2.13: of [[0, 0, 1]], row 1 by 2)."""
    problem = make(scale_grad_by_freq=True, mode=mode)
    leaf = problem.weight.clone().requires_grad_()
    rows = F.embedding(problem.input, leaf, scale_grad_by_freq=True)
    theirs = rows.sum(1) if mode == "sum" else rows.mean(1)
    torch.testing.assert_close(run(problem).dweight, torch.autograd.grad(theirs, leaf, problem.dout)[0])


def test_the_padding_row_takes_no_part() -> None:
    """Neither its values nor its gradient, and the mean does not count it."""
    ids = torch.tensor([[1, 0, 2, 0], [0, 0, 0, 0]])
    weight = torch.tensor([[torch.nan], [2.0], [4.0]], requires_grad=True)
    out = pyattn.embedding_bag(ids, weight, padding_idx=0)
    assert out.tolist() == [[3.0], [0.0]]
    assert torch.autograd.grad(out.sum(), weight)[0].tolist() == [[0.0], [0.5], [0.5]]


def test_three_ways_to_say_padding() -> None:
    problem = make(form=("lengths",), mode="sum")
    mask = torch.arange(23) < problem.lengths.unsqueeze(1)
    expected = run(problem)
    assert_bitwise(run(replace(problem, lengths=None, mask=mask)), expected)
    padded = torch.where(mask, problem.input % 40 + 1, 0)  # ids 1 to 40, and 0 as padding
    same_ids = replace(problem, input=problem.input % 40 + 1)
    assert_bitwise(run(replace(problem, lengths=None, input=padded, padding_idx=0)), run(same_ids))


@pytest.mark.parametrize("mode", MODES)
def test_offsets_are_rows_without_their_padding(mode: str) -> None:
    """Bit for bit, dropout included: it counts tokens within their bag."""
    rows = make(form=("lengths",), mode=mode, dropout_p=0.3, seed=7)
    mask = torch.arange(23) < rows.lengths.unsqueeze(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rows.lengths.cumsum(0)])
    ragged = replace(rows, input=rows.input[mask], offsets=offsets, lengths=None, include_last_offset=True)
    assert_bitwise(run(ragged), run(rows))


def test_width_of_the_padding_changes_no_bit() -> None:
    problem = make(padding_idx=0)
    wider = F.pad(problem.input, (0, 41))
    assert_bitwise(run(replace(problem, input=wider)), run(problem))


def test_weighted_mean() -> None:
    weight, ids = torch.tensor([[1.0], [5.0]]), torch.tensor([[0, 1], [0, 1]])
    w = torch.tensor([[3.0, 1.0], [1.0, -1.0]])  # the second's weights add up to 0: zeros
    assert pyattn.embedding_bag(ids, weight, per_sample_weights=w).tolist() == [[2.0], [0.0]]


def test_maxima() -> None:
    """Of equal ones the first has the gradient; NaN is largest; -inf is a number."""
    weight = torch.tensor([[1.0, torch.nan, -torch.inf], [1.0, 2.0, -torch.inf]], requires_grad=True)
    out = pyattn.embedding_bag(torch.tensor([[1, 0, 1]]), weight, mode="max")
    assert out[0, 0] == 1 and out[0, 1].isnan() and out[0, 2] == -torch.inf
    assert torch.autograd.grad(out, weight, torch.ones(1, 3))[0].tolist() == [[0, 1, 0], [1, 0, 1]]


def test_nan_is_not_hidden() -> None:
    """A token that counts has its row's NaN, even with weight 0."""
    weight = torch.tensor([[torch.nan], [1.0]])
    ids, w = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    out = pyattn.embedding_bag(ids, weight, mode="sum", per_sample_weights=w)
    assert out[0].isnan() and out[1] == 2


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(0, 5, 3, 7), (4, 0, 3, 7), (4, 0, 0, 7), (4, 5, 3, 0), (0, 0, 0, 0)], ids=str)
def test_sizes_at_the_edge(sizes: tuple[int, ...], mode: str, sparse: bool) -> None:
    for form in ((), ("offsets",), ("last offset",)):
        problem = make(*sizes, mode=mode, form=form)
        results = run(problem, sparse=sparse)
        dense = results._replace(dweight=results.dweight.to_dense() if sparse else results.dweight)
        assert_bitwise(dense, Results(*(None if x is None else x.float() for x in truth(problem))))


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_that_of_attentions_counters() -> None:
    bags, tokens, p = 5, 131, 0.3
    kept = pyattn.dropout_mask(7, p, batch=bags, q_heads=1, q_len=1, kv_len=tokens)[:, 0, 0]
    ids = torch.arange(bags * tokens).view(bags, tokens)
    weight = torch.eye(bags * tokens, dtype=torch.float64)
    out = pyattn.embedding_bag(ids, weight, mode="sum", dropout_p=p, dropout_seed=7)
    assert torch.equal(out.sum(0).view(bags, tokens) != 0, kept)
    torch.testing.assert_close(
        out.sum(0).view(bags, tokens)[kept], torch.full((int(kept.sum()),), 1 / (1 - p)).double()
    )
    mean = pyattn.embedding_bag(ids, weight, dropout_p=p, dropout_seed=7)
    torch.testing.assert_close(mean, kept.unsqueeze(-1).mul(weight.view(bags, tokens, -1)).sum(1) / kept.sum(1, True))


def test_dropout_draws_from_torchs_generator() -> None:
    ids, weight = torch.arange(400).view(4, 100), torch.randn(400, 3)
    torch.manual_seed(3)
    first, second = (pyattn.embedding_bag(ids, weight, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(pyattn.embedding_bag(ids, weight, dropout_p=0.5), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(pyattn.embedding_bag(ids, weight), pyattn.embedding_bag(ids, weight, dropout_p=0.0))
    assert torch.equal(pyattn.embedding_bag(ids, weight, dropout_p=0.5), first)  # nothing was drawn


def test_all_is_dropped() -> None:
    results = run(make(dropout_p=1.0, mode="sum"))
    assert not results.out.any() and not results.dweight.any()


# ---- ids, offsets and lengths that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [41, -1, 2**31 - 1, -(2**31)])
def test_an_id_out_of_range_is_named_with_its_place(bad: int, ids: torch.dtype, mode: str) -> None:
    problem = make(mode=mode, ids=ids)
    problem.input[3, 5] = problem.input[11, 0] = bad
    message = rf"input: expected ids in \[0, 41\), the rows of weight, got {bad} at position \(3, 5\)"
    for backend in ("cpu", "reference"):
        with pytest.raises(IndexError, match=message):
            run(problem, backend)
    problem = make(mode=mode, ids=ids, form=("offsets",))
    problem.input[7] = bad
    with pytest.raises(IndexError, match=f"got {bad} at position 7"):
        run(problem)


def test_an_id_that_would_wrap() -> None:
    with pytest.raises(IndexError, match=f"got {2**32} at position"):
        pyattn.embedding_bag(torch.tensor([[2**32]]), torch.randn(5, 3))


@pytest.mark.parametrize("dropout_p", [0.5, 1.0])
def test_a_dropped_id_is_looked_at(dropout_p: float) -> None:
    """An error must not come and go with the seed."""
    ids = torch.zeros(1, 100, dtype=torch.int64)
    ids[0, 50] = 5
    for seed in range(4):
        with pytest.raises(IndexError, match="got 5"):
            pyattn.embedding_bag(ids, torch.randn(5, 3), dropout_p=dropout_p, dropout_seed=seed)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_id_that_goes_bad_before_the_backward(sparse: bool) -> None:
    """The backward looks again: it writes where the id says."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    w = torch.ones(2, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    out = pyattn.embedding_bag(ids, weight, mode="sum", per_sample_weights=w, sparse=sparse)
    ids.data[1, 2] = 77  # unseen by autograd's version counter
    for leaf in (weight, w):
        with pytest.raises(IndexError, match=r"got 77 at position \(1, 2\)"):
            torch.autograd.grad(out.sum(), leaf, retain_graph=True)


BAD_BOUNDS = {
    "starts late": ([1, 2], "got 1 at position 0"),
    "falls": ([0, 4, 3], "got 3 at position 2"),
    "passes the end": ([0, 11], "got 11 at position 1"),
    "negative": ([0, -1, 3], "got -1 at position 1"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_offsets_that_are_none(case: str, last: bool, backend: str) -> None:
    offsets, message = BAD_BOUNDS[case]
    with pyattn.use_backend(backend), pytest.raises(ValueError, match=f"offsets: .* input's 10 ids, {message}"):
        pyattn.embedding_bag(
            torch.zeros(10, dtype=torch.int64), torch.ones(2, 3), torch.tensor(offsets), include_last_offset=last
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [6, -1])
def test_lengths_that_are_none(length: int, backend: str) -> None:
    lengths = torch.tensor([5, length])
    message = rf"lengths: expected numbers in \[0, 5\], got {length} at position 1"
    with pyattn.use_backend(backend), pytest.raises(ValueError, match=message):
        pyattn.embedding_bag(torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 3), lengths=lengths)


# ---- wrong calls -----------------------------------------------------------------------------------------------------

IDS = torch.zeros(4, 5, dtype=torch.int64)
FLAT = torch.zeros(20, dtype=torch.int64)
STARTS = torch.tensor([0, 5])
WRONG = {
    "weight of integers": ({"weight": torch.ones(3, 2).long()}, pyattn.DtypeError, "weight: expected one of float"),
    "weight of one axis": ({"weight": torch.ones(3)}, pyattn.ShapeError, r"weight: expected shape .*got \(3,\)"),
    "ids of bytes": (
        {"input": IDS.to(torch.int8)},
        pyattn.DtypeError,
        "input: expected int64 or int32",
    ),
    "ids of floats": ({"input": IDS.float()}, pyattn.DtypeError, "input: expected one of int"),
    "ids in a row": ({"input": FLAT}, pyattn.ShapeError, r"got \(20,\); one list of ids in bags takes offsets"),
    "ids in a box": ({"input": IDS[None]}, pyattn.ShapeError, r"input: expected shape \(bags, tokens\)"),
    "offsets with rows": (
        {"offsets": STARTS},
        pyattn.ShapeError,
        r"input: expected shape \(tokens,\), since",
    ),
    "no last offset": (
        {"input": FLAT, "offsets": STARTS[:0], "include_last_offset": True},
        pyattn.ShapeError,
        r"offsets: expected shape \(bags \+ 1,\), got \(0,\)",
    ),
    "last offset of none": ({"include_last_offset": True}, ValueError, "include_last_offset: expected offsets"),
    "weights of another shape": ({"per_sample_weights": torch.ones(4, 4)}, pyattn.ShapeError, r"got \(4, 4\)"),
    "weights of another dtype": (
        {"per_sample_weights": torch.ones(4, 5).double()},
        pyattn.DtypeError,
        r"per_sample_weights.to\(weight.dtype\) converts",
    ),
    "weights of a maximum": (
        {"per_sample_weights": torch.ones(4, 5), "mode": "max"},
        ValueError,
        "per_sample_weights: a maximum has no weights",
    ),
    "frequency of a maximum": ({"scale_grad_by_freq": True, "mode": "max"}, ValueError, "not defined for mode 'max'"),
    "mask of another shape": ({"mask": torch.ones(4, 1).bool()}, pyattn.ShapeError, "mask: expected input's shape"),
    "mask of integers": ({"mask": IDS}, pyattn.DtypeError, "mask: expected bool"),
    "lengths of another shape": (
        {"lengths": STARTS},
        pyattn.ShapeError,
        r"lengths: expected shape \(4,\), one",
    ),
    "lengths with offsets": (
        {"input": FLAT, "offsets": STARTS, "lengths": STARTS},
        ValueError,
        "lengths: do not go with offsets",
    ),
    "padding beyond": ({"padding_idx": 3}, ValueError, r"padding_idx: .*\[-3, 3\), got 3"),
    "padding before": ({"padding_idx": -4}, ValueError, r"padding_idx: .*\[-3, 3\), got -4"),
    "mode": ({"mode": "median"}, TypeError, "mode: expected .*'max'.* got 'median'"),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
    "max_norm": ({"max_norm": 1.0}, NotImplementedError, "max_norm: torch's renormalisation changes weight in place"),
    "elsewhere": ({"input": IDS.to("meta")}, pyattn.DeviceError, "input: expected weight's device cpu, got meta"),
    "sparse table": ({"weight": torch.ones(3, 2).to_sparse()}, TypeError, r"weight: .*to_dense\(\) converts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        pyattn.embedding_bag(**{"input": IDS, "weight": torch.ones(3, 2)} | arguments)


# ---- the function ----------------------------------------------------------------------------------------------------


def test_explain() -> None:
    answer = pyattn.explain(pyattn.embedding_bag, IDS, torch.ones(3, 2), dropout_p=0.5)
    assert (answer.op, answer.backend, answer.memory) == ("embedding_bag", "cpu", "O(tokens)")


def test_inference_keeps_no_maxima() -> None:
    problem = make(mode="max")
    with torch.no_grad():
        out = pyattn.embedding_bag(problem.input, problem.weight, mode="max")
    assert torch.equal(out, run(problem).out)


def test_the_reference_on_request() -> None:
    problem = make(form=("weighted",))
    accuracy.check_bag(run(problem, "reference"), problem)
    sparse = run(problem, "reference", sparse=True)
    assert torch.equal(sparse.dweight.to_dense(), run(problem, "reference").dweight)


def test_gradients_accumulate() -> None:
    """Nothing of a gradient is kept and written again."""
    problem = make()
    weight = torch.nn.Parameter(problem.weight)
    for _ in range(2):
        pyattn.embedding_bag(problem.input, weight).backward(problem.dout)
    torch.testing.assert_close(weight.grad, 2 * run(problem).dweight)


# ---- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"mode": "sum", "padding_idx": -1}, {"mode": "max", "padding_idx": 2}], ids=str
)
def test_module_is_torchs(options: dict) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.EmbeddingBag(11, 7, **options)
    torch.manual_seed(0)
    ours = pyattn.nn.EmbeddingBag(11, 7, **options)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.arange(12).view(3, 4) % 11
    torch.testing.assert_close(ours(ids), theirs(ids))
    torch.testing.assert_close(ours(ids.view(-1), torch.tensor([0, 5])), theirs(ids.view(-1), torch.tensor([0, 5])))


def test_module_from_pretrained() -> None:
    table = torch.randn(5, 3)
    frozen, free = (pyattn.nn.EmbeddingBag.from_pretrained(table, freeze=f, padding_idx=1) for f in (True, False))
    assert not frozen.weight.requires_grad and free.weight.requires_grad
    ids = torch.tensor([[1, 2, 4]])
    assert torch.equal(free(ids), pyattn.embedding_bag(ids, table, padding_idx=1))
    with pytest.raises(ValueError, match=r"embeddings: expected shape \(vocabulary, features\), got \(3,\)"):
        pyattn.nn.EmbeddingBag.from_pretrained(table[0])


def test_module_drops_words_in_training_only() -> None:
    bag = pyattn.nn.EmbeddingBag(500, 3, dropout_p=0.5)
    ids = torch.arange(500).view(5, 100)
    assert not torch.equal(bag(ids), bag(ids))
    bag.eval()
    assert torch.equal(bag(ids), pyattn.embedding_bag(ids, bag.weight))
    assert repr(bag) == "EmbeddingBag(500, 3, mode='mean', dropout_p=0.5)"


def test_module_refuses_what_the_function_does() -> None:
    with pytest.raises(ValueError, match=r"padding_idx: .*got 5"):
        pyattn.nn.EmbeddingBag(5, 3, padding_idx=5)
    with pytest.raises(NotImplementedError, match="max_norm"):
        pyattn.nn.EmbeddingBag(5, 3, max_norm=1.0)
    with pytest.raises(ValueError, match=r"_weight: expected shape \(5, 3\), got \(3, 5\)"):
        pyattn.nn.EmbeddingBag(5, 3, _weight=torch.ones(3, 5))


def test_the_definition_is_torchs_autograd() -> None:
    """The stated backward is the derivative of the stated forward."""
    for mode, form in (("sum", ("weighted", "mask")), ("mean", ("weighted", "offsets")), ("max", ("lengths",))):
        problem = make(5, 7, 11, 3, dtype=torch.float64, mode=mode, form=form, dropout_p=0.2)
        leaves = [x.requires_grad_() for x in (problem.weight, problem.per_sample_weights) if x is not None]
        out, _ = reference.embedding_bag_forward(*problem.operands(), **problem.options)
        expected = torch.autograd.grad(out, leaves, problem.dout)
        torch.testing.assert_close(truth(problem)[1 : 1 + len(leaves)], expected)
