"""Numerics of the attention kernels, through their launchers, against the definition in float64.

The interpreter's tiles are 32 x 16 (16 x 32 for dk/dv): lengths below lie below, at and above them. float64 is cut
along head_dim in chunks of 32, as every dtype is above 256.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accuracy
import problems
import pytest
import strategies
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Problem, Results
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._problem import empty_lse, empty_out
from pyattn.kernels import attention as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOWER_RIGHT = pyattn.Causal("lower_right")

# Tiles that one drawn problem may visit: the interpreter takes some 10 ms for each, in each of four kernels.
MAX_TILES = 40


def run(p: Problem) -> Results:
    seed = torch.tensor(p.seed)
    out, lse = empty_out(p.q, p.v.shape[-1]), empty_lse(p.q)
    kernels.attention_forward(p.q, p.k, p.v, p.bias, p.mask, seed, out, lse, **p.kernel_arguments)
    dq, dk, dv = (torch.empty_like(x) for x in (p.q, p.k, p.v))
    dbias = None if p.bias is None else torch.empty_like(p.bias)
    kernels.attention_backward(
        p.do, p.dlse, p.q, p.k, p.v, out, lse, p.bias, p.mask, seed, dq, dk, dv, dbias, **p.kernel_arguments
    )
    return Results(out, lse, dq, dk, dv, dbias)


def make(
    *batch: int,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (37, 43),
    widths: tuple[int, int] = (19, 23),
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    **options: Any,
) -> Problem:
    """By default two tiles of queries, three of keys, both ragged."""
    torch.manual_seed(0)
    p = problems.make(batch, *heads, *lengths, *widths, **options)
    return replace(
        p,
        bias=None if bias is None else torch.randn(bias).to(p.q.dtype),
        mask=None if mask is None else torch.rand(mask) < 0.6,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [None, LOWER_RIGHT, pyattn.Causal("upper_left", prefix=9)])
def test_plain_and_causal(dtype: torch.dtype, causal: pyattn.Causal | None) -> None:
    p = make(1, dtype=dtype, causal=causal)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 70), (70, 1), (16, 16), (32, 32), (43, 37), (64, 33)], ids=str)
def test_lengths_around_tiles(lengths: tuple[int, int]) -> None:
    p = make(1, lengths=lengths, causal=LOWER_RIGHT)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("diagonal_beyond", [pyattn.Causal("upper_left", prefix=100), LOWER_RIGHT])
def test_causal_that_hides_all_or_nothing(diagonal_beyond: pyattn.Causal) -> None:
    """A prefix beyond the last key, and a diagonal so negative that most rows are empty."""
    p = make(1, lengths=(67, 5), causal=diagonal_beyond)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    p = make(2, heads=(4, 2), lengths=(21, 34), dtype=dtype, dropout_p=0.3, causal=LOWER_RIGHT)
    p = replace(p, seed=2**40 + 7)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, -(2**63), 2**63 - 1])
def test_dropout_is_the_reference_bit_for_bit(seed: int) -> None:
    """With q = 0 all weights are 1 / S, so out = keep @ v / (S (1 - p)) shows which are kept: v is the identity."""
    S = 37
    p = replace(make(3, heads=(2, 2), lengths=(33, S), widths=(1, S)), seed=seed, dropout_p=0.7)
    p = replace(p, q=torch.zeros_like(p.q), v=torch.eye(S).expand(3, 2, S, S))
    kept = reference.dropout_mask(torch.tensor(seed), 0.7, 3, 2, 33, S)
    assert torch.equal(run(p).out != 0, kept)


def test_dropout_of_everything() -> None:
    p = make(1, dropout_p=1.0)
    accuracy.check(run(p), p)


BIASES = [(2, 2, 37, 43), (1, 1, 37, 43), (2, 1, 1, 43), (1, 2, 37, 1), (2, 1, 1, 1), (1, 1, 1, 1), (43,)]


@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_bias_gradient_of_every_broadcast(bias: tuple[int, ...]) -> None:
    p = make(2, bias=bias)
    p.bias[torch.rand(bias) < 0.1] = -torch.inf
    accuracy.check(run(p), p)


def test_bias_with_everything() -> None:
    p = make(2, bias=(2, 1, 43), mask=(37, 43), causal=pyattn.Causal("lower_right", prefix=5), dropout_p=0.2)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("mask", [(2, 2, 37, 43), (2, 1, 1, 43), (37, 1), (43,), ()], ids=str)
@pytest.mark.parametrize("causal", [None, LOWER_RIGHT])
def test_masks(mask: tuple[int, ...], causal: pyattn.Causal | None) -> None:
    p = make(2, mask=mask, causal=causal)
    accuracy.check(run(p), p)


def test_banded_mask_skips_tiles() -> None:
    """Open, partial and empty tiles in one mask, and rows that attend to nothing."""
    distance = torch.arange(97) - torch.arange(97).unsqueeze(-1)
    mask = (distance.abs() <= 40) & (torch.arange(97) < 70).unsqueeze(-1)
    p = replace(make(1, lengths=(97, 97)), mask=mask)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_batch_dimensions(batch: tuple[int, ...]) -> None:
    p = make(*batch, lengths=(5, 7), mask=(*batch[:1], *[1] * len(batch), 5, 7), bias=(3, 1, 5, 7) if batch else (5, 7))
    accuracy.check(run(p), p)


def test_batch_dimensions_that_cannot_be_folded() -> None:
    """Permuted batch dimensions have no common stride: inputs are copied, outputs copied back."""
    p = make(2, 3, lengths=(5, 7))
    swap = {name: getattr(p, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v", "do")}
    p = replace(p, **swap)
    results = run(p)
    accuracy.check(results, p)
    assert results.out.stride() == torch.empty_like(p.q).stride()[:-1] + (1,) or results.out.stride(
        0
    ) < results.out.stride(1)


@pytest.mark.parametrize("widths", [(16, 16), (64, 80), (1, 3), (0, 5), (5, 0)], ids=str)
def test_widths(widths: tuple[int, int]) -> None:
    p = make(1, lengths=(9, 21), widths=widths)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("widths", [(33, 70), (70, 8), (8, 33)], ids=str)
def test_widths_cut_in_chunks(widths: tuple[int, int]) -> None:
    p = make(1, widths=widths, dtype=torch.float64, bias=(37, 43), causal=LOWER_RIGHT)
    accuracy.check(run(p), p)


def test_width_above_256() -> None:
    p = make(1, lengths=(3, 5), widths=(260, 7), dtype=torch.bfloat16)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("empty", ["batch", "heads", "q_len", "kv_len"])
def test_zero_sizes(empty: str) -> None:
    batch, heads = (0,) if empty == "batch" else (2,), (0, 0) if empty == "heads" else (2, 1)
    lengths = (0 if empty == "q_len" else 3, 0 if empty == "kv_len" else 5)
    for bias in ((1,), (lengths[0], 1), lengths):
        p = make(*batch, heads=heads, lengths=lengths, bias=bias, mask=lengths, dropout_p=0.5, causal=LOWER_RIGHT)
        accuracy.check(run(p), p)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_unusual_scale(scale: float) -> None:
    p = make(1, scale=scale, causal=LOWER_RIGHT)
    accuracy.check(run(p), p)


def test_float16_scores_beyond_its_range() -> None:
    p = make(1, dtype=torch.float16, scale=1.0)
    p = replace(p, q=p.q * 100, k=p.k * 100)
    assert (p.q.double() @ p.k.double().mT).abs().max() > torch.finfo(torch.float16).max
    accuracy.check(run(p), p)


@pytest.mark.parametrize("garbage, dtype", [(math.nan, torch.bfloat16), (-math.inf, torch.float32)], ids=str)
@pytest.mark.parametrize("name, row", [("q", 11), ("k", 5), ("v", 7), ("do", 20)])
def test_masked_positions_do_not_exist(name: str, row: int, garbage: float, dtype: torch.dtype) -> None:
    """Garbage in a row that some queries attend to and others do not: results are NaN for the former only."""
    p = make(1, heads=(1, 1), dtype=dtype, mask=(1, 37, 43), causal=pyattn.Causal("lower_right", prefix=3))
    getattr(p, name)[..., row, 4] = garbage
    bias = torch.zeros(p.mask.shape, dtype=dtype).masked_fill(~p.mask, -torch.inf)
    for problem in (p, replace(p, mask=None, bias=bias)):
        check_rows(run(problem), accuracy.truth(problem))


def check_rows(results: Results, truth: Results) -> None:
    """Non-finite in the same rows as the truth; the numbers are other tests' matter."""
    for name, x, x_ref in zip(Results._fields, results, truth, strict=True):
        if x is not None:
            x, x_ref = (t.unsqueeze(-1) if name == "lse" else t for t in (x, x_ref))
            assert torch.equal(x.isfinite().all(-1), x_ref.isfinite().all(-1)), name


@pytest.mark.parametrize("name", ["q", "do"])
def test_a_lost_query_is_lost_to_dropped_keys_too(name: str) -> None:
    p = make(1, heads=(1, 1), dropout_p=0.5, seed=3)
    getattr(p, name)[..., 11, 4] = math.nan
    check_rows(run(p), accuracy.truth(p))


@given(st.data())
@settings(max_examples=20)
def test_any_problem(data: st.DataObject) -> None:
    p = data.draw(strategies.problems())
    *batch, L, S = p.scores_shape()
    tiles = math.prod(batch) * (L + 31) // 32 * ((S + 15) // 16) * math.ceil(max(p.q.shape[-1], p.v.shape[-1], 1) / 128)
    assume(tiles <= MAX_TILES)
    accuracy.check(run(p), p)


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x[1:2]], ids=["again", "alone"])
def test_same_bits_again_and_in_another_batch(change: Callable[[Tensor], Tensor]) -> None:
    p = make(2, dtype=torch.bfloat16, bias=(2, 2, 1, 43), mask=(2, 1, 37, 43), causal=LOWER_RIGHT)
    names = ("q", "k", "v", "do", "dlse", "bias", "mask")
    alone = replace(p, **{name: change(getattr(p, name)) for name in names})
    for both, one in zip(run(p), run(alone), strict=True):
        assert torch.equal(change(both), one)
