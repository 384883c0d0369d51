"""The interpreter with its repairs computes what a GPU would."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, scale: tl.float64, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + N + offs, x * y)
    tl.store(out_ptr + 2 * N + offs, tl.where(x < y, -x, tl.abs(y)))
    tl.store(out_ptr + 3 * N + offs, (x.to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16))
    tl.store(out_ptr + 4 * N + offs, tl.zeros([N], tl.bfloat16) + tl.sum(x * 0.5))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(x_ptr + offs), tl.load(y_ptr + offs)))


@triton.jit
def loop_kernel(out_ptr, stop, factor: tl.float64):
    total = 0.0
    for i in range(0, stop):
        total += i * factor
    tl.store(out_ptr, total)


def test_bfloat16_arithmetic() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4096).bfloat16()
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    x[4], y[4] = 1.0, 2**-8  # a tie: rounds to the even 1
    x, y = x[:4096], y[:4096]
    out = torch.empty(5, 4096, dtype=torch.bfloat16)
    finite = torch.where(x.isfinite(), x, 0)
    arithmetic_kernel[1,](x, y, out, 1 / 3, 4096)
    third = (x.float() * (1 / 3)).bfloat16()
    for got, expected in zip(out, (x + y, x * y, torch.where(x < y, -x, y.abs()), third), strict=False):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    arithmetic_kernel[1,](finite, y, out, 1 / 3, 4096)
    torch.testing.assert_close(out[4], (finite * 0.5).sum().expand(4096))


def test_bfloat16_dot() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[1,](x, y, out, 32)
    torch.testing.assert_close(out, x.float() @ y.float())


@pytest.mark.parametrize("stop", [0, 7])
def test_runtime_loop_bound_and_double_argument(stop: int) -> None:
    out = torch.empty(1, dtype=torch.float64)
    loop_kernel[1,](out, stop, 1 / 3)
    assert out.item() == sum(i / 3 for i in range(stop))
