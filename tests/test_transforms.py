"""Attention under autograd's and torch.func's transforms: each gives what the reference gives, or raises."""

import pytest
import torch
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._attention_backends import CpuAttention
from pyattn._problem import AttentionConfig, Operands

SCALE = 0.4


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    k = torch.randn(2, 2, 7, 3, dtype=torch.float64)
    v = torch.randn(2, 2, 7, 2, dtype=torch.float64)
    return q, k, v


@pytest.fixture
def bias() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, 5, 7, dtype=torch.float64)


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return pyattn.attention(q, k, v, bias=bias, scale=SCALE, mask=pyattn.Causal("lower_right"))


def theirs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    diagonal = k.shape[-2] - q.shape[-2]
    return reference.attention_forward(q, k, v, bias, scale=SCALE, causal=True, diagonal=diagonal)[0]


def flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten() for x in (result if isinstance(result, tuple) else (result,))])


def loss(fn):
    return lambda *inputs: fn(*inputs).square().sum()


ARGUMENTS = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, *x: torch.func.grad(loss(f), ARGUMENTS)(*x),
    "vjp": lambda f, *x: torch.func.vjp(f, *x)[1](torch.ones_like(f(*x))),
    "jvp": lambda f, *x: torch.func.jvp(f, x, tuple(torch.cos(t) for t in x))[1],
    "jvp of one argument": lambda f, q, k, v, *b: torch.func.jvp(lambda k: f(q, k, v, *b), (k,), (k.cos(),))[1],
    "vmap": lambda f, *x: torch.func.vmap(f)(*x),
    "vmap of one argument": lambda f, q, k, v, *b: torch.func.vmap(lambda q: f(q, k, v, *b))(torch.stack([q, 2 * q])),
    "vmap inner axis": lambda f, q, *x: torch.func.vmap(lambda q: f(q, *x), in_dims=2)(torch.stack([q, -q], 2)),
    "vmap of grad": lambda f, *x: torch.func.vmap(torch.func.grad(loss(f), ARGUMENTS))(*x),
    "grad of vmap": lambda f, *x: torch.func.grad(loss(torch.func.vmap(f)), ARGUMENTS)(*x),
    "vmap of jvp": lambda f, *x: torch.func.vmap(lambda *y: torch.func.jvp(f, y, y)[1])(*x),
    "grad of grad": lambda f, q, *x: torch.func.grad(lambda q: torch.func.grad(loss(f))(q, *x).square().sum())(q),
    "jvp of grad": lambda f, q, *x: torch.func.jvp(lambda q: torch.func.grad(loss(f))(q, *x), (q,), (q.cos(),))[1],
    "grad of jvp": lambda f, q, *x: torch.func.grad(
        lambda q: torch.func.jvp(lambda y: f(y, *x), (q,), (q,))[1].square().sum()
    )(q),
    "hessian": lambda f, q, *x: torch.func.hessian(lambda q: loss(f)(q, *x))(q),
    "jacrev": lambda f, q, *x: torch.func.jacrev(lambda q: f(q, *x))(q),
    "jacfwd": lambda f, q, *x: torch.func.jacfwd(lambda q: f(q, *x))(q),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, with_bias: bool, qkv: tuple[Tensor, ...], bias: Tensor) -> None:
    inputs = (*qkv, bias) if with_bias else qkv
    transform = TRANSFORMS[name]
    torch.testing.assert_close(flat(transform(ours, *inputs)), flat(transform(theirs, *inputs)))


@pytest.fixture
def bias_gradients(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with, for each backward of the backend, whether it computed a bias gradient."""
    computed = []
    backward = CpuAttention.backward

    def spy(*args, **options):
        gradients = backward(*args, **options)
        computed.append(gradients[3] is not None)
        return gradients

    monkeypatch.setattr(CpuAttention, "backward", spy)
    return computed


@pytest.mark.parametrize(
    "name", ["grad", "vjp", "vmap of grad", "grad of vmap", "grad of grad", "jvp of grad", "jacrev"]
)
def test_a_bias_that_needs_no_gradient(
    name: str, qkv: tuple[Tensor, ...], bias: Tensor, bias_gradients: list[bool]
) -> None:
    shared = bias[0]
    given, expected = (TRANSFORMS[name](lambda *x, fn=fn: fn(*x, shared), *qkv) for fn in (ours, theirs))
    torch.testing.assert_close(flat(given), flat(expected))
    assert bias_gradients and not any(bias_gradients)


def test_a_bias_that_needs_the_gradient(qkv: tuple[Tensor, ...], bias: Tensor, bias_gradients: list[bool]) -> None:
    given, expected = (torch.func.grad(lambda b, fn=fn: loss(fn)(*qkv, b))(bias) for fn in (ours, theirs))
    torch.testing.assert_close(given, expected)
    assert bias_gradients == [True]


def test_vmap_over_every_operand(qkv: tuple[Tensor, ...], bias: Tensor) -> None:
    """A mask without batch dimensions, mapped, must meet the mapped queries and not their own batch."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1]]).bool()  # [3, kv_len]
    queries = torch.stack([qkv[0] * factor for factor in (1.0, 2.0, 3.0)])

    def one(q: Tensor, mask: Tensor) -> Tensor:
        return pyattn.attention(q, *qkv[1:], mask=mask, bias=bias)

    looped = torch.stack([one(q, m) for q, m in zip(queries, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(queries, mask), looped)


def test_vmap_with_dropout_is_the_loop(qkv: tuple[Tensor, ...]) -> None:
    queries = torch.stack([qkv[0], -qkv[0]])

    def one(q: Tensor) -> Tensor:
        return pyattn.attention(q, *qkv[1:], dropout_p=0.5, dropout_seed=7)

    torch.testing.assert_close(torch.func.vmap(one)(queries), torch.stack([one(q) for q in queries]), rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_vmap_over_nothing(dropout_p: float, qkv: tuple[Tensor, ...], bias: Tensor) -> None:
    """Results and gradients are empty, of the shapes that one more example would have; seeds may be mapped as well."""
    q, k, v = qkv
    seeds = torch.empty(0, dtype=torch.int64)

    def one(q: Tensor, seed: Tensor) -> Tensor:
        return pyattn.attention(q, k, v, bias=bias, dropout_p=dropout_p, dropout_seed=seed)

    queries = q.new_empty(0, *q.shape)
    assert torch.func.vmap(one)(queries, seeds).shape == (0, 2, 4, 5, 2)
    grads = torch.func.vmap(torch.func.grad(loss(one)))(queries, seeds)
    assert grads.shape == (0, *q.shape)
    leaf = queries.clone().requires_grad_()
    shared = bias.clone().requires_grad_()
    bias = shared
    torch.func.vmap(one)(leaf, seeds).sum().backward()
    assert leaf.grad.shape == leaf.shape
    torch.testing.assert_close(shared.grad, torch.zeros_like(shared))


def test_vmap_without_a_seed_wants_randomness(qkv: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda q, k, v: pyattn.attention(q, k, v, dropout_p=0.5))(*qkv)


def test_forward_ad(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    tangent = torch.cos(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        out = torch.autograd.forward_ad.unpack_dual(ours(dual, k, v))
    torch.testing.assert_close(out.tangent, torch.func.jvp(lambda q: theirs(q, k, v), (q,), (tangent,))[1])


GRADCHECK_CASES = {
    "plain": {},
    "causal": {"mask": pyattn.Causal("upper_left", prefix=2)},
    "bool mask": {"mask": torch.arange(35).reshape(5, 7) % 3 != 0},
    "a row with nothing": {"mask": torch.arange(5).reshape(5, 1) > 0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 11},
    "negative scale": {"scale": -0.7},
}


@pytest.mark.parametrize("case", GRADCHECK_CASES)
def test_gradcheck(case: str, qkv: tuple[Tensor, ...], bias: Tensor) -> None:
    """First and second derivatives against finite differences, out and lse both."""
    inputs = [x[:1].clone().requires_grad_() for x in (*qkv, bias)]

    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = pyattn.attention_with_lse(q, k, v, bias=bias, **GRADCHECK_CASES[case])
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(fn, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fn, inputs)


def test_create_graph(qkv: tuple[Tensor, ...]) -> None:
    def second(fn) -> Tensor:
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        grads = torch.autograd.grad(loss(fn)(q, k, v), (q, k, v), create_graph=True)
        return flat(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v)))

    torch.testing.assert_close(second(ours), second(theirs))


def test_the_bare_op_refuses_transforms(qkv: tuple[Tensor, ...]) -> None:
    def op(q: Tensor) -> Tensor:
        operands = Operands(q, *qkv[1:])
        return torch.ops.pyattn.attention_forward(*operands, *AttentionConfig(scale=SCALE))[0]

    q = qkv[0]
    with pytest.raises(NotImplementedError, match="batching rule"):
        torch.func.vmap(op)(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(op, (q,), (q,))
    with pytest.raises(RuntimeError):
        torch.func.grad(loss(op))(q)


def test_checkpoint_repeats_the_dropout(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = (x.clone().requires_grad_() for x in qkv)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyattn.attention(q, k, v, dropout_p=0.4)

    torch.manual_seed(3)
    plain = torch.autograd.grad(loss(fn)(q, k, v), (q, k, v))
    torch.manual_seed(3)
    checkpointed = torch.utils.checkpoint.checkpoint(fn, q, k, v, use_reentrant=False)
    again = torch.autograd.grad(checkpointed.square().sum(), (q, k, v))
    torch.testing.assert_close(flat(again), flat(plain), rtol=0, atol=0)


# Tensors that DLPack does not show as they are, and that autograd itself makes: the gradient of what has none, and the
# derivative of torch.complex, which is imag of a conjugate.
LAZY = {
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negated without a copy": lambda x: torch.complex(torch.zeros_like(x), x.detach()).conj().imag,
}


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("name", ["do", "dlse", "q", "k", "v", "bias"])
def test_a_lazy_gradient_or_operand(kind: str, name: str, qkv: tuple[Tensor, ...], bias: Tensor) -> None:
    leaves = {n: x.clone().requires_grad_() for n, x in zip(("q", "k", "v", "bias"), (*qkv, bias), strict=True)}
    do, dlse = torch.randn(2, 4, 5, 2, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    wanted = [x for n, x in leaves.items() if n != name]

    def results(change) -> Tensor:
        x = {n: change(x) if n == name else x for n, x in (leaves | {"do": do, "dlse": dlse}).items()}
        outputs = pyattn.attention_with_lse(x["q"], x["k"], x["v"], bias=x["bias"])
        return flat((*outputs, *torch.autograd.grad(outputs, wanted, [x["do"], x["dlse"]])))

    lazy = LAZY[kind]
    assert lazy(q := qkv[0]).is_neg() or lazy(q)._is_zerotensor()
    torch.testing.assert_close(results(lazy), results(lambda x: torch.zeros_like(x) + lazy(x)), rtol=0, atol=0)


def test_transforms_of_the_backward_alone(qkv: tuple[Tensor, ...]) -> None:
    """The graph was made in plain eager mode; only its gradients are mapped, or have tangents."""
    q, k, v = qkv
    leaf = q.clone().requires_grad_()
    out = ours(leaf, k, v)
    gradients = torch.randn(3, *out.shape, dtype=out.dtype)

    def pull(do: Tensor) -> Tensor:
        return torch.autograd.grad(out, leaf, do, retain_graph=True)[0]

    looped = torch.stack([pull(do) for do in gradients])
    torch.testing.assert_close(torch.func.vmap(pull)(gradients), looped)
    batched = torch.autograd.grad(out, leaf, gradients, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched, looped)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(gradients[0], gradients[1])
        tangent = torch.autograd.forward_ad.unpack_dual(pull(dual)).tangent
    torch.testing.assert_close(tangent, looped[1])
