"""The two functions with another library's signature: torch's scaled_dot_product_attention, the article's attention.

What is compared here is meaning, in float64 and with `torch.testing`'s tolerance for it; how accurate each dtype is, is
the business of test_attention.py.
"""

import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import biases, broadcastable, generators, masks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyattn


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(math.prod(shape)))


class Call(NamedTuple):
    """The arguments of scaled_dot_product_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    def __repr__(self) -> str:
        options = {n: tuple(x.shape) if isinstance(x, Tensor) else x for n, x in self.options.items()}
        return f"Call({tuple(self.query.shape)}, {tuple(self.key.shape)}, {tuple(self.value.shape)}, {options})"


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """2-D to 5-D inputs whose leading axes broadcast, and every option that torch takes with them."""
    generator = draw(generators())
    q_len, kv_len, head_dim, v_dim = draw(st.permutations((2, 3, 5, 7)))
    lead = tuple(draw(st.lists(st.sampled_from((2, 3, 1)), max_size=3)))
    grouped = bool(lead) and draw(st.booleans())
    batch, heads = (lead[:-1], lead[-1:]) if grouped else (lead, ())
    q_heads = tuple(size * draw(st.sampled_from((1, 2, 3))) for size in heads)

    def values(heads: tuple[int, ...], *matrix: int) -> Tensor:
        # With groups, torch counts heads from the right, so they are there even if the batch is not.
        leading = draw(broadcastable(batch))
        return torch.randn((*leading, *heads, *matrix), dtype=torch.float64, generator=generator)

    query = values(q_heads, q_len, head_dim)
    key, value = values(heads, kv_len, head_dim), values(heads, kv_len, v_dim)
    # torch adds the mask to the scores, which have no axes that only value has.
    scored = torch.broadcast_shapes(*(x.shape[: x.dim() - 2 - len(heads)] for x in (query, key)))
    scores = (*scored, *q_heads, q_len, kv_len)
    options: dict[str, Any] = {"scale": draw(st.sampled_from((None, 0.3, -0.7))), "enable_gqa": grouped}
    kind = draw(st.sampled_from(("none", "causal", "bool", "float")))
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "bool":
        options["attn_mask"] = draw(masks(scores, generator))
    elif kind == "float":
        options["attn_mask"] = draw(biases(scores, torch.float64, generator))
    return Call(query, key, value, options)


def output_and_gradients(fn: Any, call: Call) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in call[:3]]
    options = dict(call.options)
    inputs = list(leaves)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.clone().requires_grad_()
        inputs.append(options["attn_mask"])
    out = fn(*leaves, **options)
    gradients = torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *gradients]


@given(calls())
def test_is_torchs(call: Call) -> None:
    ours = output_and_gradients(pyattn.scaled_dot_product_attention, call)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = output_and_gradients(F.scaled_dot_product_attention, call)
    for x, x_pt in zip(ours, theirs, strict=True):
        # A query with nothing to attend to: torch's output is 0, as ours, and its gradients are NaN.
        torch.testing.assert_close(x, torch.where(x_pt.isnan(), 0.0, x_pt))


def test_signature_is_torchs() -> None:
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    parameters = inspect.signature(pyattn.scaled_dot_product_attention).parameters.values()
    ours = [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters]
    theirs = [(a.name, a.kwarg_only, a.default_value) for a in schema.arguments]
    required = [(name, False, inspect.Parameter.empty) for name in ("query", "key", "value")]
    assert ours == required + theirs[3:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_mask_with_half_types(dtype: torch.dtype) -> None:
    """torch takes it; its gradient is float32 too."""
    q, k, v = (randn(2, 3, 5, 4, dtype=dtype) for _ in range(3))
    mask = randn(5, 5, dtype=torch.float32).requires_grad_()
    out = pyattn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert out.dtype == dtype
    exact = pyattn.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask.double())
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * v.abs().max()
    gradients = [torch.autograd.grad(x.sum(), mask)[0] for x in (out, exact)]
    assert gradients[0].dtype == torch.float32 and gradients[0].shape == mask.shape


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 5), (5, 3), (4, 4), (1, 7)])
def test_is_causal_is_upper_left(q_len: int, kv_len: int) -> None:
    q, k, v = randn(2, q_len, 3), randn(2, kv_len, 3), randn(2, kv_len, 3)
    out = pyattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(out, pyattn.attention(q, k, v, mask=pyattn.Causal("upper_left")))


def test_dropout() -> None:
    q, k, v = randn(2, 5, 3), randn(2, 7, 3), randn(2, 7, 3)
    torch.manual_seed(0)
    first = pyattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(pyattn.scaled_dot_product_attention(q, k, v, None, 0.5), first)
    assert not torch.equal(pyattn.scaled_dot_product_attention(q, k, v, None, 0.5), first)
    assert (pyattn.scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0).all()


Q, K, V = randn(2, 3, 5, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 6)
WRONG: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "mask and causal": ((Q, K, V), {"attn_mask": torch.ones(5, 7) > 0, "is_causal": True}, "attn_mask .* is_causal"),
    "one dimension": ((randn(4), K, V), {}, "query: "),
    "head_dim": ((Q, randn(2, 3, 7, 5), V), {}, "key: .*head_dim=4"),
    "dtype": ((Q, K.float(), V), {}, "key: .*float64.*float32"),
    "mask of integers": ((Q, K, V), {"attn_mask": torch.ones(5, 7).int()}, "attn_mask: .*int32"),
    "mask of another float": ((Q, K, V), {"attn_mask": torch.ones(5, 7).half()}, "attn_mask: .*float16"),
    "shape of the mask": ((Q, K, V), {"attn_mask": torch.ones(7, 5) > 0}, "attn_mask: .*kv_len must be 1 or 7, got 5"),
    "rank of the mask": ((Q, K, V), {"attn_mask": torch.ones(1, 1, 1, 5, 7) > 0}, "attn_mask: .*at most 4"),
    "batch": ((Q, randn(3, 3, 7, 4), randn(3, 3, 7, 6)), {}, "batch"),
    "heads without enable_gqa": ((randn(2, 6, 5, 4), K, V), {}, "6.*3"),
    "heads that are no multiple": (
        (randn(2, 4, 5, 4), K, V),
        {"enable_gqa": True},
        "multiple of key's.* q_heads=4 and kv_heads=3",
    ),
    "dropout_p": ((Q, K, V), {"dropout_p": 1.5}, r"dropout_p: .*\[0, 1\], got 1.5"),
    "length of value": ((Q, K, randn(2, 3, 8, 6)), {}, "value: .*kv_len=7.*8"),
}
TORCH_ACCEPTS = {
    "mask and causal",  # on the CPU, though its documentation names the error
    "length of value",  # and reads outside the key
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_torchs(case: str) -> None:
    """Where torch raises, so do we, and what catches torch's error catches ours; the message names the argument."""
    tensors, options, message = WRONG[case]
    with pytest.raises((RuntimeError, ValueError), match=message) as caught:
        pyattn.scaled_dot_product_attention(*tensors, **options)
    assert isinstance(caught.value, RuntimeError) or case == "dropout_p"  # torch raises RuntimeError for a number, too
    if case not in TORCH_ACCEPTS:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*tensors, **options)


# ---- the article's function ------------------------------------------------------------------------------------------


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """As the article has it."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 1, 7), (5, 7), (1, 5, 7), (7,), None], ids=str)
def test_compute_attention(shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    query, key, value = (randn(2, n, w).requires_grad_() for n, w in ((5, 3), (7, 3), (7, 4)))
    mask = None if shape is None else (randn(*shape) > 0.0).to(dtype)
    if mask is not None:
        mask[..., 2] = 3 if dtype != torch.bool else True  # no row is empty, and anything but 0 attends
    ours, theirs = (fn(query, key, value, mask) for fn in (pyattn.compute_attention, formula))
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(out.sin().sum(), (query, key, value)) for out in (ours, theirs))
    for x, x_pt in zip(*gradients, strict=True):
        torch.testing.assert_close(x, x_pt)


def test_compute_attention_with_masked_rows() -> None:
    """The formula gives NaN for a query without keys; here it is 0, and so are its gradients."""
    query, key, value = (randn(2, 5, 3).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 5, 5).int()
    mask[0, 3] = 0
    out = pyattn.compute_attention(query, key, value, mask)
    expected = formula(query, key, value, mask).detach()
    assert expected[0, 3].isnan().all() and (out[0, 3] == 0).all()
    torch.testing.assert_close(out.detach(), expected.nan_to_num(0.0))
    out.sum().backward()
    assert (query.grad[0, 3] == 0).all() and all(x.grad.isfinite().all() for x in (query, key, value))


def test_compute_attention_is_one_head_per_sample() -> None:
    """Samples stay apart, whatever stands in for heads inside."""
    query, key, value = randn(3, 5, 4), randn(3, 7, 4), randn(3, 7, 2)
    whole = pyattn.compute_attention(query, key, value)
    for i in range(3):
        part = pyattn.compute_attention(query[i : i + 1], key[i : i + 1], value[i : i + 1])
        assert torch.equal(part, whole[i : i + 1])
    with pytest.raises(pyattn.ShapeError, match="key: .*batch=3"):
        pyattn.compute_attention(query, key[:1], value[:1])
