"""The dispatcher ops: torch.compile, torch.export, FakeTensor, opcheck, tracing, autocast."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyattn
from pyattn._problem import AttentionConfig, Operands

BACKENDS = ["eager", "aot_eager", "inductor"]


def inputs(seed: int = 0, q_len: int = 5, kv_len: int = 7, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, q_len, 8), torch.randn(2, 2, kv_len, 8), torch.randn(2, 2, kv_len, 6)
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(k.shape[-2]) < 4
    return pyattn.attention(q * 2, k, v, mask=pyattn.Causal("lower_right") & mask) + 1


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = (q.sum(-1, keepdim=True) * k.sum(-1)[:, :1].unsqueeze(-2)).tanh()
    out, lse = pyattn.attention_with_lse(q, k, v, bias=bias, scale=-0.3)
    return out * lse.unsqueeze(-1)


def torch_signature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pyattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def article(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return pyattn.compute_attention(q[:, 0], k[:, 0], v[:, 0], (torch.arange(k.shape[-2]) != 2).to(torch.int64))


FUNCTIONS = [masked, biased, torch_signature, article]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def gradients(fn: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(fn(*qkv).square().sum(), qkv)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_compile_fullgraph(fn: Callable[..., Tensor], backend: str) -> None:
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs()), fn(*inputs()))
    qkv = inputs(grad=True)
    torch.testing.assert_close(gradients(compiled, qkv), gradients(fn, qkv))


def test_compile_with_dynamic_lengths_does_not_recompile() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(torch_signature, fullgraph=True, dynamic=True, backend=counting)
    for q_len, kv_len in ((5, 7), (6, 11), (13, 17)):
        qkv = inputs(q_len=q_len, kv_len=kv_len)
        torch.testing.assert_close(compiled(*qkv), torch_signature(*qkv))
    assert graphs == 1


def test_compiled_dropout_draws_a_new_mask_each_call() -> None:
    q, k, v = inputs()
    compiled = torch.compile(lambda q: pyattn.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(q), compiled(q))
    torch.manual_seed(5)
    first = compiled(q)
    torch.manual_seed(5)
    assert torch.equal(compiled(q), first)


def test_compiled_backward_uses_the_forward_mask_of_dropout() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pyattn.attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor(9))

    qkv = inputs(grad=True)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, qkv), gradients(fn, qkv))


def test_a_wrong_call_is_an_error_under_compile() -> None:
    q, k, v = inputs()
    compiled = torch.compile(pyattn.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expected key's kv_len 7, got 6"):
        compiled(q, k, v[..., :6, :])


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    kv_len = torch.export.Dim("kv_len", min=5, max=1024)
    shapes = {"q": {}, "k": {2: kv_len}, "v": {2: kv_len}}
    program = torch.export.export(Layer(), inputs(), dynamic_shapes=shapes, strict=strict)
    assert "pyattn.attention_forward" in str(program.graph)
    longer = inputs(kv_len=19)
    torch.testing.assert_close(program.module()(*longer), masked(*longer))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_records_the_op() -> None:
    """A plain extension call would be baked into the trace as a constant."""
    traced = torch.jit.trace(torch_signature, inputs(), check_trace=False)
    torch.testing.assert_close(traced(*inputs(1)), torch_signature(*inputs(1)))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_fake_tensors_have_the_real_ones_shapes_and_strides(layout: str) -> None:
    def build() -> tuple[Tensor, Tensor, Tensor]:
        if layout == "contiguous":
            return torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
        if layout == "transposed":
            return tuple(torch.randn(2, n, 4, d).transpose(1, 2) for n, d in ((5, 8), (7, 8), (7, 6)))
        packed = torch.randn(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return tuple(packed.unbind())

    real = pyattn.attention_with_lse(*build())
    with FakeTensorMode():
        fake = pyattn.attention_with_lse(*build())
    for r, f in zip(real, fake, strict=True):
        assert (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)


def test_output_follows_the_query_in_memory() -> None:
    q, k, v = (torch.randn(2, n, 4, d).transpose(1, 2) for n, d in ((5, 8), (7, 8), (7, 6)))
    assert pyattn.attention(q, k, v).transpose(1, 2).is_contiguous()


OPCHECK_CASES = {
    "plain": ({}, {}),
    "causal": ({}, {"align": 2, "right": 0, "prefix": 1}),
    "mask": ({"mask": torch.arange(35).reshape(5, 7) % 3 != 0}, {}),
    "bias": ({"bias": torch.randn(4, 1, 7, requires_grad=True)}, {}),
    "dropout": ({"seed": torch.tensor(3)}, {"dropout_p": 0.25}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck_forward(case: str) -> None:
    tensors, scalars = OPCHECK_CASES[case]
    operands = Operands(*inputs(grad=True), **tensors)
    config = AttentionConfig(scale=0.5, **scalars)
    torch.library.opcheck(torch.ops.pyattn.attention_forward, (*operands, *config))


def test_opcheck_backward() -> None:
    qkv = inputs()
    operands = Operands(*qkv, bias=torch.randn(5, 7))
    config = AttentionConfig(scale=0.5)
    out, lse = torch.ops.pyattn.attention_forward(*operands, *config)
    args = (torch.randn_like(out), torch.randn_like(lse), out, lse, *operands, *config, True)
    torch.library.opcheck(torch.ops.pyattn.attention_backward, args)


def test_the_op_differentiates_without_the_front() -> None:
    qkv = inputs(grad=True)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.pyattn.attention_forward(*Operands(q, k, v), *AttentionConfig(scale=8**-0.5))[0]

    torch.testing.assert_close(gradients(op, qkv), gradients(pyattn.attention, qkv))


def test_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in inputs())
    out = pyattn.attention(q, k, v)
    assert out.is_meta and out.shape == (2, 4, 5, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inside_autograd(dtype: torch.dtype) -> None:
    qkv = inputs(grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = pyattn.attention(*qkv)
        wide = pyattn.attention(*(x.double() for x in qkv))
    assert (out.dtype, wide.dtype) == (dtype, torch.float64)
    expected = pyattn.attention(*(x.to(dtype) for x in qkv))
    assert torch.equal(out, expected)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), qkv))


def test_autocast_under_compile() -> None:
    qkv = inputs()
    compiled = torch.compile(pyattn.attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(*qkv), pyattn.attention(*qkv))


def test_parameters_and_subclasses() -> None:
    class Tagged(Tensor):
        pass

    q, k, v = inputs()
    expected = pyattn.attention(q, k, v)
    assert torch.equal(pyattn.attention(nn.Parameter(q), k, v), expected)
    assert torch.equal(pyattn.attention(q.as_subclass(Tagged), k, v), expected)
