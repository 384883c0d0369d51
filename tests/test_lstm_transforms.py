"""The LSTM differentiated twice, compiled, exported, faked, under autocast: the definition, torch's, or an error."""

from dataclasses import replace
from typing import Any

import accuracy
import pytest
import torch
from lstm_problems import LstmProblem, call, make, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn


@pytest.fixture
def problem() -> LstmProblem:
    return make(3, 4, 2, 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def leaves_of(problem: LstmProblem) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach().requires_grad_() for x in problem.floating)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_twice(reverse: bool, biases: Any, state: bool) -> None:
    problem = make(3, 3, 2, 2, dtype=torch.float64, state=state, biases=biases, reverse=reverse)
    leaves = leaves_of(problem)
    present = tuple(x for x in leaves if x is not None)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        return call(problem, tuple(None if x is None else next(rest) for x in leaves))

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present)


def test_second_derivative_beside_padding_of_garbage(problem: LstmProblem) -> None:
    x = torch.where(problem.valid(), problem.input, torch.nan).requires_grad_()
    output = call(problem, (x, *problem.floating[1:]))[0]
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_is_refused_and_the_definition_does_it(name: str, problem: LstmProblem) -> None:
    def output(x: Tensor) -> Tensor:
        return call(problem, (x, *problem.floating[1:]))[0]

    with pytest.raises(NotImplementedError, match="cpu: kernels are not differentiable by torch.func or forward-mode"):
        TRANSFORMS[name](output, problem.input)
    if name == "vmap":
        expected = torch.stack([output(problem.input), output(-problem.input)])
    elif name == "grad":
        x = problem.input.clone().requires_grad_()
        expected = torch.autograd.grad(output(x).square().sum(), x)[0]
    else:
        step = 1e-6 * problem.input.cos()
        expected = (output(problem.input + step) - output(problem.input - step)) / 2e-6
    with pyattn.use_backend("reference"):
        torch.testing.assert_close(TRANSFORMS[name](output, problem.input), expected)


def test_batched_gradients(problem: LstmProblem) -> None:
    x = problem.input.clone().requires_grad_()
    output = call(problem, (x, *problem.floating[1:]))[0]
    cotangents = torch.stack([problem.doutput, -problem.doutput, problem.doutput * 2])
    batched = torch.autograd.grad(output, x, cotangents, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(output, x, c, retain_graph=True)[0] for c in cotangents]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


# ---- graphs ----------------------------------------------------------------------------------------------------------


def module(**options: Any) -> pyattn.nn.LSTM:
    torch.manual_seed(0)
    return pyattn.nn.LSTM(3, 5, num_layers=2, bidirectional=True, **options)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend: str, with_lengths: bool, batch_first: bool) -> None:
    layer = module(batch_first=batch_first)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn((4, 6, 3) if batch_first else (6, 4, 3), requires_grad=True)
    lengths = torch.tensor([6, 0, 3, 4]) if with_lengths else None

    def results(layer: Any) -> list[Tensor]:
        output, (h_n, c_n) = layer(x, lengths=lengths)
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        return [output, h_n, c_n, *torch.autograd.grad(loss, [x, *module_parameters])]

    module_parameters = list(layer.parameters())
    torch.testing.assert_close(results(compiled), results(layer))


def test_export() -> None:
    layer = module(batch_first=True).eval()
    batch, seq = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("seq", min=2, max=64)
    inputs = {"input": torch.randn(4, 6, 3), "lengths": torch.tensor([6, 1, 3, 4])}
    shapes = {"input": {0: batch, 1: seq}, "lengths": {0: batch}}
    program = torch.export.export(layer, (), inputs, dynamic_shapes=shapes)
    assert "pyattn.lstm_forward" in str(program.graph)
    x, lengths = torch.randn(7, 9, 3), torch.tensor([1, 9, 0, 4, 4, 8, 2])
    (output, states), expected = program.module()(input=x, lengths=lengths), layer(x, lengths=lengths)
    torch.testing.assert_close((output, *states), (expected[0], *expected[1]))


@pytest.mark.parametrize("steps_first", [False, True])
def test_fake_tensors(steps_first: bool) -> None:
    def operands() -> tuple[Tensor, ...]:
        x = torch.zeros(7, 4, 3).transpose(0, 1) if steps_first else torch.zeros(4, 7, 3)
        return x, torch.zeros(20, 3), torch.zeros(20, 5)

    real = pyattn.lstm(*operands())
    with FakeTensorMode():
        fake = pyattn.lstm(*operands())
    with torch.device("meta"):
        meta = pyattn.lstm(*operands())
    for x, *others in zip(real, fake, meta, strict=True):
        for other in others:
            assert (other.shape, other.stride(), other.dtype) == (x.shape, x.stride(), x.dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("whole", [False, True])
def test_opcheck(whole: bool) -> None:
    # Whole vectors of units and no padding: the rest of `saved` is not written, and opcheck compares all of it.
    problem = make(
        3, 4, 2, 16, dtype=torch.float64, state=whole, biases=(whole, whole), lengths="full" if whole else None
    )
    operands = (*leaves_of(problem), problem.lengths, whole)
    torch.library.opcheck(torch.ops.pyattn.lstm_forward, operands)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in operands)
    *_, saved = torch.ops.pyattn.lstm_forward(*detached)
    cotangents = (problem.doutput.clone().requires_grad_(), problem.dh_n, problem.dc_n if whole else None)
    torch.library.opcheck(torch.ops.pyattn.lstm_backward, (*cotangents, saved, *operands))


def test_second_derivative_of_the_op(problem: LstmProblem) -> None:
    def op(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.pyattn.lstm_forward(*values, problem.lengths, False)[:3]

    assert torch.autograd.gradgradcheck(op, leaves_of(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_but_float64(dtype: torch.dtype) -> None:
    problem = make()
    with torch.autocast("cpu", dtype=dtype):
        results = run(replace(problem, **{x: getattr(problem, x).to(dtype) for x in ("doutput", "dh_n", "dc_n")}))
    assert results.output.dtype == results.c_n.dtype == dtype and results.dinput.dtype == torch.float32
    half = problem.map(lambda x: x.to(dtype))
    accuracy.check_lstm(run(half)._replace(output=results.output, h_n=results.h_n, c_n=results.c_n), half)
    exact = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(run(exact).output, run(exact).output) and run(exact).output.dtype == torch.float64


def test_subclasses_and_parameters() -> None:
    class Tagged(Tensor):
        pass

    problem = make()
    input, *others = problem.floating
    expected = call(problem, problem.floating)[0]
    assert torch.equal(call(problem, (torch.nn.Parameter(input), *others))[0], expected)
    assert torch.equal(call(problem, (input.as_subclass(Tagged), *others))[0], expected)
