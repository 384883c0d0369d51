"""The embedding bag differentiated twice, mapped, compiled, exported, faked: what the definition gives, or an error."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bag_problems import BagProblem, make, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


CASES = {
    "sum": {"mode": "sum", "form": ("weighted", "lengths"), "padding_idx": 2},
    "mean": {"form": ("weighted", "mask"), "scale_grad_by_freq": True},
    "mean of offsets": {"form": ("weighted", "last offset"), "dropout_p": 0.3},
    "max": {"mode": "max", "form": ("offsets",), "padding_idx": 0},
}


def small(case: str, dtype: torch.dtype = torch.float64) -> BagProblem:
    return make(3, 5, 7, 4, dtype=dtype, **CASES[case])


def of(problem: BagProblem) -> Callable[..., Tensor]:
    """pyattn.embedding_bag as a function of the table and, if there are, the weights."""
    options = problem.options | ({"dropout_seed": problem.seed} if problem.dropout_p else {})

    def bag(weight: Tensor, weights: Tensor | None = None) -> Tensor:
        return pyattn.embedding_bag(
            problem.input, weight, problem.offsets, per_sample_weights=weights, mask=problem.mask,
            lengths=problem.lengths, **options,
        )  # fmt: skip

    return bag


def floating(problem: BagProblem) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (problem.weight, problem.per_sample_weights) if x is not None]


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_twice(case: str) -> None:
    problem = replace(small(case), scale_grad_by_freq=False)  # which is by design not the derivative
    assert torch.autograd.gradcheck(of(problem), floating(problem))
    assert torch.autograd.gradgradcheck(of(problem), floating(problem))


def test_a_sparse_gradient_has_no_derivative() -> None:
    problem = small("max")
    leaf = problem.weight.requires_grad_()
    out = pyattn.embedding_bag(problem.input, leaf, problem.offsets, sparse=True)
    with pytest.raises(NotImplementedError, match="sparse: .* cannot be differentiated or mapped; sparse=False"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_is_for_the_definition(name: str) -> None:
    problem = make(3, 5, 7, 4, dtype=torch.float64, padding_idx=0, mode="sum")
    f, x = of(problem), problem.weight
    with pytest.raises(NotImplementedError, match="cpu: kernels are not differentiable by torch.func.*reference"):
        TRANSFORMS[name](f, x)
    with pyattn.use_backend("reference"):
        result = TRANSFORMS[name](f, x)
    counts = torch.zeros(3, 7, dtype=torch.float64)  # the matrix that the bag multiplies the table by
    counts.scatter_add_(1, problem.input, (problem.input != 0).double())
    torch.testing.assert_close(result, TRANSFORMS[name](lambda y: counts @ y, x))


def test_batched_gradients() -> None:
    problem = make(3, 5, 7, 4, dtype=torch.float64, padding_idx=0)
    leaf = problem.weight.requires_grad_()
    douts = torch.stack([problem.dout, problem.dout.cos()])
    (mapped,) = torch.autograd.grad(of(problem)(leaf), leaf, douts, is_grads_batched=True)
    for gradient, dout in zip(mapped, douts, strict=True):
        torch.testing.assert_close(gradient, run(replace(problem, dout=dout)).dweight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("case", CASES)
def test_compile_fullgraph(case: str, backend: str) -> None:
    problem = small(case, torch.float32)
    leaves = floating(problem)
    compiled = torch.compile(of(problem), fullgraph=True, backend=backend)
    out = compiled(*leaves)
    expected = run(problem)
    assert torch.equal(out, expected.out)
    gradients = torch.autograd.grad(out, leaves, problem.dout)
    for gradient, of_kernel in zip(gradients, expected[1:], strict=False):
        assert torch.equal(gradient, of_kernel)


def test_compile_refuses_a_sparse_gradient() -> None:
    problem = make()
    expected = run(problem).out
    leaf = problem.weight.requires_grad_()
    compiled = torch.compile(
        lambda w: pyattn.embedding_bag(problem.input, w, sparse=True), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="sparse: a graph cannot hold a gradient whose number of rows depends on data"):
        compiled(leaf)
    with torch.no_grad():
        assert torch.equal(compiled(leaf), expected)


def test_compile_draws_its_own_dropout() -> None:
    ids, weight = torch.arange(400).view(4, 100), torch.randn(400, 3)
    compiled = torch.compile(lambda w: pyattn.embedding_bag(ids, w, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(weight), compiled(weight))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = pyattn.nn.EmbeddingBag(41, 7, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


def test_export() -> None:
    layer, ids = Layer(), torch.arange(40).view(8, 5)
    bags, tokens = torch.export.Dim("bags", min=2, max=4096), torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (ids,), dynamic_shapes={"ids": {0: bags, 1: tokens}})
    assert "pyattn.embedding_bag_forward" in str(program.graph)
    other = torch.arange(39).view(3, 13)
    assert torch.equal(program.module()(other), layer(other))


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("form", [(), ("offsets",), ("last offset",)], ids=str)
def test_fake_tensors(form: tuple[str, ...], mode: str) -> None:
    real = run(make(form=form, mode=mode))

    def call() -> Tensor:
        offsets = torch.zeros(18 if form == ("last offset",) else 17, dtype=torch.int64) if form else None
        input = torch.zeros((17 * 23,) if form else (17, 23), dtype=torch.int64)
        last = form == ("last offset",)
        return pyattn.embedding_bag(input, torch.zeros(41, 67), offsets, mode=mode, include_last_offset=last)

    with FakeTensorMode():
        fake = call()
    with torch.device("meta"):
        meta = call()
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.out.shape, real.out.stride(), real.out.dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    problem = small(case)
    weight, *weights = floating(problem)
    operands = problem.operands()._replace(weight=weight, per_sample_weights=weights[0] if weights else None)
    arguments = (*operands, *problem.options.values())
    torch.library.opcheck(torch.ops.pyattn.embedding_bag_forward, arguments)
    out, largest = torch.ops.pyattn.embedding_bag_forward(*arguments)
    dout = torch.randn_like(out).requires_grad_()
    for asked in ((True, bool(weights)), (True, False)):
        torch.library.opcheck(torch.ops.pyattn.embedding_bag_backward, (dout, largest, *arguments, *asked))


def test_the_op_asks_for_its_seed() -> None:
    operands = make(dropout_p=0.5).operands()._replace(seed=None)
    with pytest.raises(ValueError, match="seed: dropout_p=0.5 needs a 0-d int64 tensor, got None"):
        torch.ops.pyattn.embedding_bag_forward(*operands, "mean", None, False, False, 0.5)


def test_autocast_leaves_the_table_as_it_is() -> None:
    """As torch's own bag: it is no matrix product."""
    problem = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = pyattn.embedding_bag(problem.input, problem.weight)
        theirs = torch.nn.functional.embedding_bag(problem.input, problem.weight)
    assert ours.dtype == theirs.dtype == torch.float32


def test_subclasses_and_parameters() -> None:
    class Tagged(Tensor):
        pass

    problem = make()
    expected = run(problem).out
    assert torch.equal(pyattn.embedding_bag(problem.input, torch.nn.Parameter(problem.weight)), expected)
    assert torch.equal(pyattn.embedding_bag(problem.input, problem.weight.as_subclass(Tagged)), expected)
