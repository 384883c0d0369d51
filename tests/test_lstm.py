"""The LSTM on the CPU backend: drawn problems, named regimes, edges, and the function and module around the kernels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accuracy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstm_problems import PER_SAMPLE, LstmProblem, Results, call, make, run, truth
from strategies import DTYPES, lay_out
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import pyattn
from pyattn import _C

# Around vectors of 2 to 16 and the register tiles' 3 or 6 rows; tiles have 36 samples, blocks 128 steps.
BATCHES = (2, 3, 5, 7, 1, 0, 13, 37)
STEPS = (3, 2, 5, 7, 1, 0, 17)
WIDTHS = (3, 2, 5, 7, 8, 13, 16, 17, 1, 33, 67)
LAYOUTS = ("contiguous", "lengths before heads", "wide rows", "strided", "unaligned")


@st.composite
def lstm_problems(draw: st.DrawFn, dtype: torch.dtype | None = None) -> LstmProblem:
    """Any problem that the kernels take."""
    problem = make(
        draw(st.sampled_from(BATCHES)),
        draw(st.sampled_from(STEPS)),
        draw(st.sampled_from((*WIDTHS, 0))),
        draw(st.sampled_from(WIDTHS)),
        dtype=draw(st.sampled_from(DTYPES)) if dtype is None else dtype,
        seed=draw(st.integers(0, 2**32 - 1)),
        sharpness=draw(st.sampled_from((1.0, 0.01, 5.0))),
        state=draw(st.booleans()),
        biases=draw(st.sampled_from(((True, True), (False, False), (True, False), (False, True)))),
        lengths=draw(st.sampled_from(("random", None, "full", "empty"))),
        reverse=draw(st.booleans()),
    )
    garbage = draw(st.sampled_from((None, torch.nan, torch.inf)))
    if garbage is not None:
        problem = replace(problem, input=torch.where(problem.valid(), problem.input, garbage))
    return problem.map(lambda x: lay_out(x, draw(st.sampled_from(LAYOUTS))))


def assert_bitwise(results: Results, expected: Results, names: tuple[str, ...] = Results._fields) -> None:
    for name in names:
        x, x_expected = getattr(results, name), getattr(expected, name)
        assert (x is None) == (x_expected is None), name
        if x is not None:
            assert x.shape == x_expected.shape and x.dtype == x_expected.dtype
            assert torch.equal(x, x_expected), f"{name}: {int((x != x_expected).sum())} of {x.numel()} elements differ"


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_problem(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(lstm_problems(dtype))
    accuracy.check_lstm(run(problem), problem)


REGIMES = {
    "more samples than a tile": {"batch": 37},
    "three tiles": {"batch": 103, "seq": 5},
    "more steps than a block": {"batch": 5, "seq": 83},
    "a long sequence": {"batch": 2, "seq": 531},
    "wide": {"hidden": 257, "features": 131},  # several panels of every kind, and sums in parts
    "one of everything": {"batch": 1, "seq": 1, "features": 1, "hidden": 1},
    "saturated": {"sharpness": 30.0},
    "the benchmark's": {"batch": 19, "seq": 29, "features": 64, "hidden": 128},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(regime: str, dtype: torch.dtype) -> None:
    problem = make(**REGIMES[regime], dtype=dtype)
    accuracy.check_lstm(run(problem), problem)


@pytest.mark.skipif(
    _C.isa() != _C.available_isas()[0], reason="torch's kernel has the best instruction set, and may round less by FMA"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_torchs_kernel(dtype: torch.dtype) -> None:
    """The benchmark's gate at one point, for the results it looks at: pooled over 8 seeds, at most 1.1 times torch's
    error. The weights have the deviation that torch's start with."""
    start = {"sharpness": 3**-0.5, "state": False, "lengths": None}
    problems = [make(16, 50, 64, 128, dtype=dtype, seed=seed, **start) for seed in range(8)]
    ours, truths = [run(p) for p in problems], [truth(p) for p in problems]
    with pyattn.use_backend("torch"):
        theirs = [run(p) for p in problems]
    for name in ("output", "dinput", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"):
        accuracy.assert_within_gate(name, *([getattr(row, name) for row in rows] for rows in (ours, truths, theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations(name: str, dtype: torch.dtype) -> None:
    """One unit whose other gates are open: c_n is the activation of x, relative to itself, over its whole range."""
    eps = torch.finfo(dtype).eps
    x = torch.cat([torch.linspace(-40, 40, 20011), torch.logspace(-30, 0, 1009), -torch.logspace(-30, 0, 1009)])
    x = x.to(dtype)
    if name == "tanh":  # c = sigmoid(inf) tanh(x)
        weight, bias, c0 = [0, 0, 1, 0], [torch.inf, -torch.inf, 0, 0], None
    else:  # c = sigmoid(x) 1
        weight, bias, c0 = [0, 1, 0, 0], [-torch.inf, 0, 0, 0], torch.ones(len(x), 1, dtype=dtype)
    weight_ih, bias = (torch.tensor(v, dtype=dtype) for v in (weight, bias))
    _, _, c_n = pyattn.lstm(x.view(-1, 1, 1), weight_ih.unsqueeze(1), torch.zeros(4, 1, dtype=dtype), bias, c0=c0)
    expected = getattr(torch, name)(x.double())
    # e^x is right for an x that is off by an eps (without FMA x log2(e) is rounded); below normal numbers it is 0.
    allowed = (2 + x.double().abs()) * eps * expected.abs() + torch.finfo(dtype).smallest_normal
    assert ((c_n.flatten().double() - expected).abs() <= allowed).all()


def test_an_activation_of_nothing_is_nothing() -> None:
    nan = torch.tensor([[[torch.nan]]])
    assert all(x.isnan().all() for x in pyattn.lstm(nan, torch.ones(4, 1), torch.ones(4, 1)))


# ---- the same bits ---------------------------------------------------------------------------------------------------


@given(problem=lstm_problems())
def test_strides_change_no_bit(problem: LstmProblem) -> None:
    assert_bitwise(run(problem.map(Tensor.contiguous)), run(problem))


@given(problem=lstm_problems())
def test_threads_change_no_bit(problem: LstmProblem) -> None:
    expected = run(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results = run(problem)
        torch.set_num_threads(1)
        assert_bitwise(results, expected)


def test_threads_change_no_bit_of_several_tiles() -> None:
    problem = make(151, 11, 17, 33)
    expected = run(problem)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert_bitwise(run(problem), expected)


@given(problem=lstm_problems())
def test_inference_is_the_forward_of_training(problem: LstmProblem) -> None:
    with torch.no_grad():
        states = call(problem, problem.floating)
    trained = run(problem)
    assert_bitwise(trained._replace(output=states[0], h_n=states[1], c_n=states[2]), trained)


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_changes_no_bit(reverse: bool) -> None:
    problem = make(41, 9, lengths="random", reverse=reverse)
    padded = replace(
        problem,
        input=torch.nn.functional.pad(problem.input, (0, 0, 0, 4), value=torch.nan),
        doutput=torch.nn.functional.pad(problem.doutput, (0, 0, 0, 4), value=torch.nan),
    )
    results = run(padded)
    assert not results.output[:, 9:].any() and not results.dinput[:, 9:].any()
    assert_bitwise(results._replace(output=results.output[:, :9], dinput=results.dinput[:, :9]), run(problem))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_batch_changes_no_bit_of_a_sample(reverse: bool) -> None:
    problem = make(41, 9, lengths="random", reverse=reverse)
    whole = run(problem)
    for i in (0, 3, 17, 40):
        fields = ("input", "h0", "c0", "lengths", "doutput", "dh_n", "dc_n")
        one = run(replace(problem, **{name: getattr(problem, name)[i : i + 1] for name in fields}))
        assert_bitwise(one, whole._replace(**{n: getattr(whole, n)[i : i + 1] for n in PER_SAMPLE}), PER_SAMPLE)


def test_reverse_is_the_reversed_sequence() -> None:
    problem = make(7, 9, lengths=None)
    flipped = run(replace(problem, input=problem.input.flip(1), doutput=problem.doutput.flip(1)))
    flipped = flipped._replace(output=flipped.output.flip(1), dinput=flipped.dinput.flip(1))
    assert_bitwise(run(replace(problem, reverse=True)), flipped)


def test_the_backward_runs_twice() -> None:
    """It must not use up what the forward saved."""
    problem = make()
    x = problem.input.clone().requires_grad_()
    output = call(problem, (x, *problem.floating[1:]))[0]
    first, second = (torch.autograd.grad(output, x, problem.doutput, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_result_that_is_not_used_has_gradient_zero(used: tuple[int, ...]) -> None:
    problem = make()
    leaves = tuple(x.detach().requires_grad_() for x in problem.floating)
    states = call(problem, leaves)
    some = torch.autograd.grad([states[i] for i in used], leaves, [problem.cotangents[i] for i in used])
    kept = [x if i in used else torch.zeros_like(x) for i, x in enumerate(problem.cotangents)]
    expected = run(replace(problem, doutput=kept[0], dh_n=kept[1], dc_n=kept[2]))
    assert_bitwise(expected._replace(**dict(zip(Results._fields[3:], some, strict=True))), expected)


# ---- wrong calls -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input of two axes": ({"input": torch.ones(2, 3)}, pyattn.ShapeError, r"input: expected shape \(batch, seq, fea"),
    "input of integers": ({"input": torch.ones(2, 4, 3).long()}, pyattn.DtypeError, "input: expected one of float"),
    "features": (
        {"weight_ih": torch.ones(20, 4)},
        pyattn.ShapeError,
        r"weight_ih: expected shape \(gates, features\) with features=3 \(from input\), got \(20, 4\)",
    ),
    "gates that are not four": (
        {"weight_ih": torch.ones(15, 3), "weight_hh": torch.ones(15, 5)},
        pyattn.ShapeError,
        r"weight_ih: expected shape \(20, 3\)",
    ),
    "a bias of another length": ({"bias_hh": torch.ones(5)}, pyattn.ShapeError, "bias_hh: expected shape .*gates=20"),
    "a state of another batch": ({"h0": torch.ones(3, 5)}, pyattn.ShapeError, "h0: expected shape .*batch=2"),
    "another dtype": (
        {"weight_hh": torch.ones(20, 5).double()},
        pyattn.DtypeError,
        r"weight_hh: expected input's dtype torch.float32, got torch.float64; weight_hh.to\(input.dtype\) converts",
    ),
    "elsewhere": ({"c0": torch.ones(2, 5, device="meta")}, pyattn.DeviceError, "c0: expected input's device cpu"),
    "lengths of another batch": ({"lengths": torch.ones(3).long()}, pyattn.ShapeError, "lengths: expected .*batch=2"),
    "lengths of floats": ({"lengths": torch.ones(2)}, pyattn.DtypeError, "lengths: expected .*int64.* got torch.float"),
    "lengths of int16": (
        {"lengths": torch.ones(2).short()},
        pyattn.DtypeError,
        r"lengths: expected int64 or int32, got torch.int16; lengths.long\(\) converts",
    ),
    "a length beyond": (
        {"lengths": torch.tensor([4, 5])},
        ValueError,
        r"lengths: expected numbers of steps in \[0, 4\], got 5 of sample 1",
    ),
    "a negative length": ({"lengths": torch.tensor([-1, 2])}, ValueError, "got -1 of sample 0"),
    "sparse": ({"input": torch.ones(2, 4, 3).to_sparse()}, TypeError, r"input: .*to_dense\(\) converts"),
}


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case: str, backend: Any) -> None:
    arguments, error, message = WRONG[case]
    right = {"input": torch.ones(2, 4, 3), "weight_ih": torch.ones(20, 3), "weight_hh": torch.ones(20, 5)}
    with pyattn.use_backend(backend), pytest.raises(error, match=message):
        pyattn.lstm(**right | arguments)


def test_a_length_that_goes_bad_before_the_backward() -> None:
    """The backward looks again: it writes where the lengths say."""
    lengths = torch.tensor([2, 1])
    x = torch.randn(2, 4, 3, requires_grad=True)
    output, _, _ = pyattn.lstm(x, torch.ones(20, 3), torch.ones(20, 5), lengths=lengths)
    lengths.data[1] = 77  # unseen by autograd's version counter
    with pytest.raises(ValueError, match="got 77 of sample 1"):
        output.sum().backward()


def test_lengths_of_int32() -> None:
    problem = make()
    assert_bitwise(run(replace(problem, lengths=problem.lengths.int())), run(problem))


# ---- backends --------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    answer = pyattn.explain(pyattn.lstm, torch.ones(2, 4, 3), torch.ones(20, 3), torch.ones(20, 5))
    assert (answer.op, answer.backend, answer.isa) == ("lstm", "cpu", _C.isa())
    assert set(answer.refusals) == {"torch", "reference"}
    layer = pyattn.nn.LSTM(3, 5, num_layers=2)
    assert pyattn.explain(layer, torch.ones(2, 4, 3)) == answer
    with pyattn.use_backend("torch"):
        assert pyattn.explain(layer, torch.ones(2, 4, 3)).backend == "torch"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", ["random", None])
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("state", [False, True])
def test_torchs_own_gives_the_same(state: bool, biases: Any, lengths: str | None, reverse: bool) -> None:
    problem = make(11, 6, state=state, biases=biases, lengths=lengths, reverse=reverse)
    assert problem.lengths is None or 0 in problem.lengths
    with pyattn.use_backend("torch"):
        theirs = run(problem)
    accuracy.check_lstm(theirs, problem)


def test_reference_backend_gives_the_same() -> None:
    problem = make()
    with pyattn.use_backend("reference"):
        accuracy.check_lstm(run(problem), problem)


# ---- the module: torch's, with lengths -------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "everything": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
SEQ, BATCH, FEATURES, HIDDEN = 7, 5, 3, 4


def modules(**options: Any) -> tuple[pyattn.nn.LSTM, torch.nn.LSTM]:
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(FEATURES, HIDDEN, **options)
    ours = pyattn.nn.LSTM(FEATURES, HIDDEN, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def state_of(module: torch.nn.RNNBase, *batch: int) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(rows, *batch, HIDDEN), torch.randn(rows, *batch, HIDDEN)


def assert_same_call(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any) -> None:
    (output, states), (output_pt, states_pt) = ours(*args), theirs(*args)
    torch.testing.assert_close((output, *states), (output_pt, *states_pt))
    if isinstance(output, Tensor):
        assert output.is_contiguous()


@pytest.mark.parametrize("given", [False, True], ids=["", "with state"])
@pytest.mark.parametrize("name", OPTIONS)
def test_module_is_torchs(name: str, given: bool) -> None:
    ours, theirs = modules(**OPTIONS[name])
    x = torch.randn(BATCH, SEQ, FEATURES) if ours.batch_first else torch.randn(SEQ, BATCH, FEATURES)
    assert_same_call(ours, theirs, x, *((state_of(ours, BATCH),) if given else ()))
    assert_same_call(ours, theirs, x[0], *((state_of(ours),) if given else ()))  # without a batch
    assert repr(ours) == repr(theirs)
    for module in (ours, theirs):
        module.zero_grad()
        module(x)[0].square().sum().backward()
    for (key, p), p_pt in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, p_pt.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("given", [False, True], ids=["", "with state"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_sequence_and_lengths_are_torchs(name: str, ordered: bool, given: bool) -> None:
    ours, theirs = modules(**OPTIONS[name])
    lengths = torch.tensor([7, 4, 4, 2, 1]) if ordered else torch.tensor([4, 1, 7, 4, 2])
    x = torch.randn(BATCH, SEQ, FEATURES) if ours.batch_first else torch.randn(SEQ, BATCH, FEATURES)
    packed = pack_padded_sequence(x, lengths, batch_first=ours.batch_first, enforce_sorted=ordered)
    hx = (state_of(ours, BATCH),) if given else ()
    assert_same_call(ours, theirs, packed, *hx)

    padded, (h_n, c_n) = ours(x, *hx, lengths=lengths)
    output, (h_packed, c_packed) = ours(packed, *hx)
    output = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=ours.batch_first)[0]
    for value, expected in ((padded, output), (h_n, h_packed), (c_n, c_packed)):
        assert torch.equal(value, expected)


def test_a_length_of_zero_is_the_initial_state() -> None:
    ours, _ = modules(num_layers=2, bidirectional=True)
    hx = state_of(ours, BATCH)
    output, state = ours(torch.full((SEQ, BATCH, FEATURES), torch.nan), hx, lengths=torch.zeros(BATCH).long())
    assert not output.any() and torch.equal(state[0], hx[0]) and torch.equal(state[1], hx[1])


def test_dropout_is_between_layers() -> None:
    ours, _ = modules(num_layers=2, dropout=0.4)
    x = torch.randn(SEQ, BATCH, FEATURES)
    torch.manual_seed(1)
    output, _ = ours(x)
    torch.manual_seed(1)
    first, _, _ = pyattn.lstm(x.transpose(0, 1), *ours.all_weights[0])
    expected, _, _ = pyattn.lstm(torch.dropout(first, 0.4, True), *ours.all_weights[1])
    assert torch.equal(output, expected.transpose(0, 1))
    assert torch.equal(ours.eval()(x)[0], modules(num_layers=2)[0](x)[0])


def test_what_the_module_refuses() -> None:
    with pytest.raises(NotImplementedError, match="proj_size: no kernel of pyattn computes the projection, got 3"):
        pyattn.nn.LSTM(4, 5, proj_size=3)
    module = pyattn.nn.LSTM(FEATURES, HIDDEN)
    x = torch.randn(SEQ, BATCH, FEATURES)
    with pytest.raises(
        pyattn.ShapeError, match=r"input: expected shape \(seq, batch, features\), or \(seq, features\)"
    ):
        module(torch.randn(SEQ, BATCH, FEATURES + 1))
    with pytest.raises(pyattn.ShapeError, match=r"c_0: expected shape \(1, 5, 4\), got \(1, 4, 4\)"):
        module(x, (torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, 4, HIDDEN)))
    with pytest.raises(ValueError, match="lengths: a PackedSequence has its own"):
        module(pack_padded_sequence(x, torch.full((BATCH,), SEQ)), lengths=torch.ones(BATCH).long())
    with pytest.raises(ValueError, match="lengths: an input without a batch axis"):
        module(x[0], lengths=torch.tensor(3))
