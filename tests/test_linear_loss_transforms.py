"""Linear layer and cross-entropy in one differentiated twice, mapped, compiled, exported, faked: what torch's own two
functions give, or an error."""

from collections.abc import Callable

import pytest
import torch
from linear_loss_problems import composition
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn

ROWS, FEATURES, CLASSES = 79, 5, 400  # over a block of classes

TARGET = torch.arange(ROWS) % 3
TARGET[3] = -100


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = drawn(CLASSES, FEATURES, seed=1), drawn(CLASSES, seed=2)


@pytest.fixture
def x() -> Tensor:
    return drawn(ROWS, FEATURES, seed=0)


def of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x * 2, WEIGHT, TARGET, linear_bias=BIAS, label_smoothing=0.1)


OURS, THEIRS = of(pyattn.linear_cross_entropy), of(composition)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_twice(reduction: str) -> None:
    target, weight = torch.tensor([0, 4, -100, 2]), drawn(5, seed=3).abs()
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": weight}

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return pyattn.linear_cross_entropy(x, w, target, linear_bias=b, **options)

    leaves = [drawn(*shape, seed=4).requires_grad_() for shape in ((4, 3), (5, 3), (5,))]
    with pyattn.use_backend("cpu"):
        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, -x])),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, x: Tensor) -> None:
    torch.testing.assert_close(TRANSFORMS[name](OURS, x), TRANSFORMS[name](THEIRS, x))


def test_kernels_refuse_what_they_cannot_differentiate(x: Tensor) -> None:
    with (
        pyattn.use_backend("cpu"),
        pytest.raises(NotImplementedError, match="cpu: kernels are not differentiable by torch.func"),
    ):
        torch.func.grad(OURS)(x)


def test_batched_gradients(x: Tensor) -> None:
    x = x.requires_grad_()
    cotangents = torch.arange(3.0).double()
    ours, theirs = (torch.autograd.grad(f(x), x, cotangents, is_grads_batched=True) for f in (OURS, THEIRS))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend: str, x: Tensor) -> None:
    compiled = torch.compile(OURS, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), THEIRS(x))
    x = x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(THEIRS(x), x))


class Layer(torch.nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.loss = pyattn.nn.LinearCrossEntropyLoss(FEATURES, 11, dtype=torch.float64, **options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(x, target)


@pytest.mark.parametrize("options", [{}, {"bias": True, "reduction": "sum"}, {"out_features": (2,)}], ids=str)
def test_compile_the_parameters_gradients(options: dict, x: Tensor) -> None:
    layer = Layer(**options)
    target = torch.arange(ROWS) % 11
    target = target.unsqueeze(-1).expand(-1, 2) if "out_features" in options else target
    leaves = [x.requires_grad_(), *layer.parameters()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x, target), leaves) for f in (compiled, layer))
    torch.testing.assert_close(ours, theirs)


def test_compile_class_probabilities(x: Tensor) -> None:
    target = drawn(ROWS, CLASSES, seed=5).softmax(1).requires_grad_()
    compiled = torch.compile(lambda t: pyattn.linear_cross_entropy(x, WEIGHT, t), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(composition(x, WEIGHT, target), target)
    torch.testing.assert_close(torch.autograd.grad(compiled(target), target), expected)


def test_export(x: Tensor) -> None:
    rows, layer = torch.export.Dim("rows", min=2, max=4096), Layer()
    target = torch.arange(ROWS) % 11
    program = torch.export.export(layer, (x, target), dynamic_shapes={"x": {0: rows}, "target": {0: rows}})
    assert "pyattn.linear_cross_entropy_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x[:5], target[:5]), layer(x[:5], target[:5]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows", [(), (7,)])
def test_fake_tensors(rows: tuple[int, ...], reduction: str) -> None:
    def call() -> Tensor:
        target = torch.zeros(rows, dtype=torch.int64)
        return pyattn.linear_cross_entropy(torch.zeros(*rows, 5), torch.zeros(30011, 5), target, reduction=reduction)

    real = call()
    with FakeTensorMode():
        fake = call()
    with torch.device("meta"):
        meta = call()
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("bias", [None, BIAS[:11]], ids=["without bias", "bias"])
@pytest.mark.parametrize("reduction, label_smoothing", [("mean", 0.0), ("none", 0.1)])
def test_opcheck(reduction: str, label_smoothing: float, bias: Tensor | None, x: Tensor) -> None:
    weight = WEIGHT[:11].clone().requires_grad_()
    problem = (x.requires_grad_(), weight, TARGET, bias, None, reduction, -100, label_smoothing)
    torch.library.opcheck(torch.ops.pyattn.linear_cross_entropy_forward, problem)
    loss, m, l = torch.ops.pyattn.linear_cross_entropy_forward(x.detach(), weight.detach(), *problem[2:])
    dloss = torch.randn_like(loss).requires_grad_()
    torch.library.opcheck(torch.ops.pyattn.linear_cross_entropy_backward, (dloss, m, l, *problem))


def test_the_op_refuses_a_gradient_it_has_not() -> None:
    weight = torch.rand(5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="which kernels do not compute"):
        torch.ops.pyattn.linear_cross_entropy_forward(
            torch.randn(4, 3), torch.randn(5, 3), torch.arange(4), None, weight, "mean", -100, 0.0
        )


def test_autocast_computes_in_float32(x: Tensor) -> None:
    """As torch does for losses; and operands may then be of several dtypes, as parameters and activations are."""
    half, weight = x.bfloat16().requires_grad_(), WEIGHT.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pyattn.linear_cross_entropy(half, weight, TARGET)
        assert composition(half, weight, TARGET).dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, composition(half.float(), weight, TARGET))
    dinput, dweight = torch.autograd.grad(loss, (half, weight))
    assert (dinput.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_subclasses_and_parameters(x: Tensor) -> None:
    class Tagged(Tensor):
        pass

    expected = OURS(x)
    assert torch.equal(OURS(torch.nn.Parameter(x)), expected)
    assert torch.equal(OURS(x.as_subclass(Tagged)), expected)


def test_checkpoint(x: Tensor) -> None:
    x = x.requires_grad_()
    ours = torch.utils.checkpoint.checkpoint(OURS, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(ours, x)[0], torch.autograd.grad(OURS(x), x)[0])
