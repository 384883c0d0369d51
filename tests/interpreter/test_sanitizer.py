"""One planted bug of each kind, so that a hook that no longer fires is noticed."""

import pytest
import torch
import triton
import triton.language as tl
from sanitizer import AccessError


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def increment_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(out_ptr + offs) + 1)


@triton.jit
def shift_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(out_ptr + BLOCK + offs))


@triton.jit
def fill_kernel(out_ptr, stride, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK) * stride, tl.zeros([BLOCK], tl.float32))


@triton.jit
def undefined_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n)))


@triton.jit
def atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_sound_kernel_passes() -> None:
    x, out = torch.randn(20), torch.empty(20)
    copy_kernel[2,](x, out, 20, 16)
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("x_size, out_size, what", [(20, 32, "load"), (32, 20, "store")])
def test_out_of_bounds_of_a_view(x_size: int, out_size: int, what: str) -> None:
    with pytest.raises(AccessError, match=f"{what} outside the elements"):
        copy_kernel[2,](torch.zeros(64)[:x_size], torch.zeros(64)[:out_size], 32, 16)


def test_gap_between_elements() -> None:
    with pytest.raises(AccessError, match="load outside the elements"):
        copy_kernel[1,](torch.zeros(16, 2)[:, 0], torch.zeros(16), 16, 16)


def test_write_after_write() -> None:
    with pytest.raises(AccessError, match="store to an element that another program stores"):
        fill_kernel[2,](torch.zeros(16), 1, 16)


def test_read_after_write() -> None:
    with pytest.raises(AccessError, match="load of an element that another program stores"):
        increment_kernel[2,](torch.zeros(16), 16)


def test_write_after_read() -> None:
    with pytest.raises(AccessError, match="store to an element that another program loads"):
        shift_kernel[2,](torch.zeros(48), 16)


def test_two_lanes_of_one_store() -> None:
    with pytest.raises(AccessError, match="two lanes"):
        fill_kernel[1,](torch.zeros(16), 0, 16)


def test_masked_load_without_other_is_undefined() -> None:
    out = torch.zeros(1)
    undefined_kernel[1,](torch.ones(16), out, 3, 16)
    assert out.isnan()


def test_atomics_are_refused() -> None:
    with pytest.raises(AccessError, match="atomic"):
        atomic_kernel[1,](torch.zeros(1))
