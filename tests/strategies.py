"""Hypothesis strategies that draw a whole attention problem: sizes, dtype, memory layouts, masks, bias, options.

Drawn are small numbers and names, the simplest first, so that a failure shrinks to a small and plain problem. Values
come from a torch generator of a drawn seed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from problems import Problem
from torch import Tensor

import pyattn
from pyattn._checks import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Small sizes are primes, so that no wrong axis has the right size and every vector has a remainder. Long ones lie at,
# below and above the kernels' tiles: units of 64 keys, blocks of 256 and 512, 24 to 64 queries.
SMALL = (2, 3, 5, 7, 11, 13, 1)
LONG_Q = (23, 24, 25, 31, 47, 49, 61, 64, 67, 97)
LONG_KV = (61, 64, 67, 127, 128, 131, 257, 263, 509, 521)
WIDTHS = (2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 64, 67, 80, 128, 131, 256, 1)
AXES = ("batch", "heads", "q_len", "kv_len", "head_dim", "v_dim")

# Multiply-adds of one product with the scores' shape. It keeps an example at some 10 ms, most of them for the truth.
MAX_PRODUCT = 2**21

LAYOUTS = ("contiguous", "lengths before heads", "packed", "wide rows", "strided", "unaligned")
EXPANDED = ("one sample", "one head")
GARBAGE = (torch.nan, torch.inf, -torch.inf)


class Sizes(NamedTuple):
    batch: tuple[int, ...]
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int

    @property
    def scores(self) -> tuple[int, ...]:
        return (*self.batch, self.q_heads, self.q_len, self.kv_len)


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype | None = None, long: bool | None = None) -> Problem:
    """Any problem that pyattn takes, with gradients for both outputs; what no query attends to may hold garbage.

    With `long`, lengths reach over the kernels' tiles. Hypothesis varies what it drew before, so that some hundred
    draws may hardly touch one dtype or length: a test that needs each of them asks for each.
    """
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    size = draw(sizes(long=draw(st.booleans()) if long is None else long))
    generator = draw(generators())

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # Scores with a deviation of about 1; flat: the weights are alike; peaked: one weight takes all.
    sharpness = draw(st.sampled_from((1.0, 0.01, 30.0)))
    problem = Problem(
        q=values(*size.batch, size.q_heads, size.q_len, size.head_dim) * sharpness,
        k=values(*size.batch, size.kv_heads, size.kv_len, size.head_dim),
        v=values(*size.batch, size.kv_heads, size.kv_len, size.v_dim),
        do=values(*size.batch, size.q_heads, size.q_len, size.v_dim),
        dlse=values(*size.batch, size.q_heads, size.q_len).to(accumulation_dtype(dtype))
        if draw(st.booleans())
        else None,
        bias=draw(st.none() | biases(size.scores, dtype, generator)),
        mask=draw(st.none() | masks(size.scores, generator)),
        causal=draw(causals(size.q_len, size.kv_len)),
        scale=draw(st.sampled_from((None, 0.3, -0.7, 0.0))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3, 0.9, 1.0))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )
    layouts = LAYOUTS + EXPANDED
    if draw(st.booleans()):
        problem, layouts = with_garbage(problem, draw(st.sampled_from(GARBAGE))), LAYOUTS
    names = ("q", "k", "v", "do", "dlse", "bias", "mask")
    tensors = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    return replace(problem, **{name: lay_out(x, draw(st.sampled_from(layouts))) for name, x in tensors.items()})


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def sizes(draw: st.DrawFn, long: bool) -> Sizes:
    batch = draw(st.lists(st.sampled_from((2, 3, 1)), max_size=2))
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    q_heads = kv_heads * draw(st.sampled_from((1, 2, 3)))
    if long:
        q_len, kv_len = draw(st.sampled_from(LONG_Q + SMALL)), draw(st.sampled_from(LONG_KV))
        if draw(st.booleans()):
            q_len, kv_len = kv_len, q_len
    else:
        q_len, kv_len = draw(st.sampled_from(SMALL)), draw(st.sampled_from(SMALL))
    if draw(st.sampled_from((False, False, True))):
        q_len = kv_len  # the only case in which a causal mask needs no alignment

    while math.prod(batch) * q_heads * q_len * kv_len * min(WIDTHS) > MAX_PRODUCT:
        batch, q_heads, kv_heads = [1] * len(batch), q_heads // kv_heads, 1
        q_len = min(q_len, 61)
    fitting = [w for w in WIDTHS if math.prod(batch) * q_heads * q_len * kv_len * w <= MAX_PRODUCT]
    head_dim, v_dim = draw(st.sampled_from(fitting)), draw(st.sampled_from(fitting))

    empty = draw(st.sampled_from((*[None] * 14, *AXES)))
    if empty == "batch":
        batch = [0, *batch[1:]]
    if empty == "heads":
        q_heads = kv_heads = 0
    lengths = {"q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "v_dim": v_dim}
    return Sizes(tuple(batch), q_heads, kv_heads, **{a: 0 if a == empty else size for a, size in lengths.items()})


@st.composite
def causals(draw: st.DrawFn, q_len: int, kv_len: int) -> pyattn.Causal | None:
    aligns = ("upper_left", "lower_right") + ((None,) if q_len == kv_len else ())
    prefix = draw(st.sampled_from((0, 0, 0, 1, kv_len // 2, kv_len + 2)))
    return draw(st.sampled_from((None, *(pyattn.Causal(align, prefix) for align in aligns))))


@st.composite
def broadcastable(draw: st.DrawFn, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that broadcasts from the right to `shape`: any axis may be 1, leading axes may be missing."""
    kept = draw(st.integers(0, len(shape)))
    return tuple(draw(st.sampled_from((size, 1))) for size in shape[len(shape) - kept :])


@st.composite
def masks(draw: st.DrawFn, scores: Sequence[int], generator: torch.Generator) -> Tensor:
    """A bool mask: single keys at random, padding at the end of each sample, or a band; maybe with empty rows."""
    kind = draw(st.sampled_from(("random", "padding", "band")))
    q_len, kv_len = scores[-2:]
    if kind == "random":
        density = draw(st.sampled_from((0.5, 0.9, 0.1)))
        mask = torch.rand(draw(broadcastable(scores)), generator=generator) < density
    elif kind == "padding":
        one_per_sample = (*scores[:-3], *[1] * min(len(scores), 3))
        lengths = torch.randint(0, kv_len + 1, one_per_sample, generator=generator)
        mask = torch.arange(kv_len) < lengths
    else:
        width = draw(st.integers(0, kv_len))
        mask = (torch.arange(kv_len) - torch.arange(q_len).unsqueeze(-1)).abs() <= width
    if draw(st.booleans()):
        mask = mask & (torch.rand((*mask.shape[:-1], 1) if mask.dim() else (), generator=generator) < 0.7)
    return mask


@st.composite
def biases(draw: st.DrawFn, scores: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A bias, in half types maybe of float32; one in ten elements is -inf, which masks."""
    bias = torch.randn(draw(broadcastable(scores)), generator=generator)
    if draw(st.booleans()):
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = -torch.inf
    return bias.to(draw(st.sampled_from((dtype, accumulation_dtype(dtype)))))


def with_garbage(problem: Problem, garbage: float) -> Problem:
    """`problem` with `garbage` in the keys and values that no query attends to, and in the queries that attend to
    nothing, with their gradients."""
    attended = problem.attended()
    query_seen = attended.any(dim=-1, keepdim=True)
    group = problem.q.shape[-3] // max(problem.k.shape[-3], 1)
    key_seen = attended.any(dim=-2).unflatten(-2, (-1, group)).any(dim=-2) if group else attended.any(dim=-2)
    key_seen = key_seen.unsqueeze(-1)
    changes = {name: torch.where(query_seen, getattr(problem, name), garbage) for name in ("q", "do")}
    changes |= {name: torch.where(key_seen, getattr(problem, name), garbage) for name in ("k", "v")}
    return replace(problem, **changes)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in memory of another layout, between NaNs; `EXPANDED` layouts repeat the first sample or head.

    An axis that `x` lacks leaves it contiguous.
    """
    if layout == "one sample" and x.dim() > 3:
        return x[:1].expand_as(x)
    if layout == "one head" and x.dim() > 2:
        return x[..., :1, :, :].expand_as(x)
    if layout == "lengths before heads" and x.dim() > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "packed" and x.dim() > 2:
        *batch, heads, length, width = x.shape
        view = _nan((*batch, length, 3, heads, width), x)[..., 1, :, :].transpose(-3, -2)
    elif layout == "wide rows" and x.dim() > 0:
        view = _nan((*x.shape[:-1], x.shape[-1] + 3), x)[..., 2:-1]
    elif layout == "strided" and x.dim() > 0:
        view = _nan((*x.shape[:-1], 2 * x.shape[-1]), x)[..., ::2]
    elif layout == "unaligned":
        view = _nan((x.numel() + 1,), x)[1:].view(x.shape)
    else:
        return x.contiguous()
    return view.copy_(x)


def lay_out_classes(x: Tensor, layout: str) -> Tensor:
    """The values of `x`, in which axis 1 is classes, in memory of another layout; what does not apply changes nothing.
    "one row" repeats the first."""
    if layout == "classes last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "classes last" and x.dim() == 2:
        return x.mT.contiguous().mT
    if layout == "one row" and x.dim() > 1:
        return x[:1].expand_as(x)
    if x.is_floating_point() or layout in ("wide rows", "strided"):
        return lay_out(x, layout)
    return x.contiguous()


def _nan(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan if like.is_floating_point() else True, dtype=like.dtype)
