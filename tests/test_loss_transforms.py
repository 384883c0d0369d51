"""Cross-entropy differentiated twice, mapped, compiled, exported, faked: what torch's own gives, or an error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn
from pyattn._cross_entropy import TORCH_LOGITS

ROWS, CLASSES = 60, 1000  # more logits than torch's own call is preferred for
assert ROWS * CLASSES > TORCH_LOGITS

TARGET = torch.arange(ROWS) % 7
TARGET[3] = -100


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x * 2, TARGET, label_smoothing=0.1)


OURS, THEIRS = of(pyattn.cross_entropy), of(F.cross_entropy)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


SMALL_TARGETS = {
    "indices": torch.tensor([0, 4, -100, 2]),
    "probabilities": torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).double(),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", SMALL_TARGETS)
def test_gradcheck_twice(kind: str, reduction: str) -> None:
    weight = torch.rand(5, generator=torch.Generator().manual_seed(2)).double()
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def loss(x: Tensor) -> Tensor:
        return pyattn.cross_entropy(x, SMALL_TARGETS[kind], weight, **options)

    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with pyattn.use_backend("cpu"):
        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)


def test_second_derivative_beside_an_ignored_row_of_garbage() -> None:
    """The definition's exponentials of that row overflow; their zero cotangents must not turn to NaN."""
    x = torch.full((2, 3), 1e4, dtype=torch.float64)
    x[0] = torch.randn(3)
    x.requires_grad_()
    with pyattn.use_backend("cpu"):
        loss = pyattn.cross_entropy(x, torch.tensor([1, -100]))
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, -x])),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
    "vjp of jvp": lambda f, x: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (y.cos(),))[1])(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, logits: Tensor) -> None:
    torch.testing.assert_close(TRANSFORMS[name](OURS, logits), TRANSFORMS[name](THEIRS, logits))


def test_kernels_refuse_what_they_cannot_differentiate(logits: Tensor) -> None:
    with (
        pyattn.use_backend("cpu"),
        pytest.raises(NotImplementedError, match="cpu: kernels are not differentiable by torch.func"),
    ):
        torch.func.grad(OURS)(logits)


def test_batched_gradients(logits: Tensor) -> None:
    x = logits.requires_grad_()
    cotangents = torch.arange(3.0).double()
    ours, theirs = (torch.autograd.grad(f(x), x, cotangents, is_grads_batched=True) for f in (OURS, THEIRS))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend: str, logits: Tensor) -> None:
    compiled = torch.compile(OURS, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(logits), THEIRS(logits))
    x = logits.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(THEIRS(x), x))


def test_compile_where_the_target_has_a_gradient(logits: Tensor) -> None:
    target = logits.softmax(1).requires_grad_()
    compiled = torch.compile(lambda t: pyattn.cross_entropy(logits, t), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(F.cross_entropy(logits, target), target)
    torch.testing.assert_close(torch.autograd.grad(compiled(target), target), expected)


class Layer(torch.nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return pyattn.cross_entropy(x, target)


def test_export(logits: Tensor) -> None:
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Layer(), (logits, TARGET), dynamic_shapes={"x": {0: rows}, "target": {0: rows}})
    assert "pyattn.cross_entropy_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(logits[:7], TARGET[:7]), F.cross_entropy(logits[:7], TARGET[:7]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (2, 100, 30, 20), (50000,)])
def test_fake_tensors(shape: tuple[int, ...], reduction: str) -> None:
    def call() -> Tensor:
        axis = min(len(shape) - 1, 1)
        target = torch.zeros((*shape[:axis], *shape[axis + 1 :]), dtype=torch.int64)
        return pyattn.cross_entropy(torch.zeros(shape), target, reduction=reduction)

    real = call()
    with FakeTensorMode():
        fake = call()
    with torch.device("meta"):
        meta = call()
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)


OPCHECK = {
    "mean": (None, "mean", 0.0),
    "smoothed, weighted": (torch.rand(5).double(), "none", 0.1),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("case", OPCHECK)
@pytest.mark.parametrize("kind", SMALL_TARGETS)
def test_opcheck(kind: str, case: str) -> None:
    weight, reduction, label_smoothing = OPCHECK[case]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    problem = (x, SMALL_TARGETS[kind], weight, reduction, -100, label_smoothing)
    torch.library.opcheck(torch.ops.pyattn.cross_entropy_forward, problem)
    loss, m, l = torch.ops.pyattn.cross_entropy_forward(x.detach(), *problem[1:])
    dloss = torch.randn_like(loss).requires_grad_()
    torch.library.opcheck(torch.ops.pyattn.cross_entropy_backward, (dloss, m, l, *problem))


def test_the_op_refuses_a_gradient_it_has_not() -> None:
    weight = torch.rand(5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="kernels compute only input's"):
        torch.ops.pyattn.cross_entropy_forward(torch.randn(4, 5), torch.arange(4), weight, "mean", -100, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_widens_as_torch_does(dtype: torch.dtype, logits: Tensor) -> None:
    half = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = OURS(half), THEIRS(half)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(ours, half)[0].dtype == dtype


def test_subclasses_and_parameters(logits: Tensor) -> None:
    class Tagged(Tensor):
        pass

    expected = OURS(logits)
    assert torch.equal(OURS(torch.nn.Parameter(logits)), expected)
    assert torch.equal(OURS(logits.as_subclass(Tagged)), expected)
