"""The Triton kernels on a CUDA device: `pytest -m gpu`. What the ladder tests without one is here tested with one."""

from collections.abc import Iterator
from dataclasses import fields, replace

import accuracy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, make, run
from strategies import problems
from torch import Tensor

import pyattn
from pyattn import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with pyattn.use_backend("triton"):
        yield


def on_gpu(problem: Problem) -> Problem:
    """The same problem with its tensors, strides included, on the CUDA device."""

    def move(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

    return replace(problem, **{field.name: move(getattr(problem, field.name)) for field in fields(problem)})


@given(st.data())
@settings(max_examples=200)
def test_any_problem(data: st.DataObject) -> None:
    problem = on_gpu(data.draw(problems()))
    accuracy.check(run(problem), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256, 320])
@pytest.mark.parametrize("causal", [None, pyattn.Causal("lower_right")])
def test_every_tile_of_the_table(dtype: torch.dtype, width: int, causal: pyattn.Causal | None) -> None:
    """Several tiles in both directions, ragged at the end."""
    bias = torch.randn(4, 389, 523).to(dtype)
    problem = on_gpu(make((2,), 4, 2, 389, 523, width, width, dtype=dtype, causal=causal, bias=bias))
    accuracy.check(run(problem), problem)


def test_dropout_is_the_reference_bit_for_bit() -> None:
    S = 197
    problem = replace(make((2,), 4, 2, 131, S, 1, S, dropout_p=0.3), seed=-(2**62) + 1)
    problem = on_gpu(replace(problem, q=torch.zeros_like(problem.q), v=torch.eye(S).expand(2, 2, S, S)))
    kept = reference.dropout_mask(torch.tensor(problem.seed), 0.3, 2, 4, 131, S)
    assert torch.equal((run(problem).out != 0).cpu(), kept)


def test_same_bits_every_time() -> None:
    """Also where a bias gradient is summed over everything: no order is left to chance."""
    bias = torch.randn(1, 1).bfloat16()
    problem = on_gpu(make((2,), 4, 2, 1021, 1031, 64, 64, dtype=torch.bfloat16, bias=bias, dropout_p=0.1))
    first = run(problem)
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, run(problem), strict=True))


def test_heads_beyond_32_bits_of_offset() -> None:
    """2^31 elements between the first and the last query of a head."""
    stride, L = 2**24, 129
    memory = torch.empty((L - 1) * stride + 64, device="cuda", dtype=torch.bfloat16)
    q = memory.as_strided((1, 1, L, 64), (0, 0, stride, 1))
    near, k, v = torch.randn(3, 1, 1, L, 64, device="cuda").bfloat16()
    q.copy_(near)
    assert torch.equal(pyattn.attention(q, k, v), pyattn.attention(near, k, v))
