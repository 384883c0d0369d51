"""Cross-entropy: one pass over the logits forward, one backward, a program per row.

With shares q_c of a row's target (see reference.py), s their sum, and m and l the state of the online softmax,
loss = s log(l) + sum_c q_c (m - x_c) and dx = dloss (s e^(x - m) / l - q). Class axes are read where they lie. Sums are
float32 (float64 for float64) in blocks of BLOCK_V classes from class 0; the sum over rows is torch's, in float64.

A class index is data that the host does not see. One that is no class makes its row's loss and gradient NaN; it is
never used as an address.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Classes in one step: 32 KB of float32 per operand would not fit the registers of 8 warps, 16 KB do.
MAX_BLOCK_V, NUM_WARPS = 4096, 8
ROWS_BLOCK = 1024  # of the kernel that only looks at targets


class Rows(NamedTuple):
    """A [batch, classes, positions] tensor as a kernel argument; None in its place means that it is absent."""

    ptr: Any
    stride_n: Any
    stride_v: Any
    stride_p: Any


@triton.jit
def row_ptr(tensor, row, P):
    """Start of a row; row is int64, since all of them may span more than 2^31 elements."""
    return tensor.ptr + row // P * tensor.stride_n + row % P * tensor.stride_p


@triton.jit
def load_index(indices, row, P, V, ignore_index):
    """The row's class index, whether the row counts, and whether the index is a class."""
    y = tl.load(row_ptr(indices, row, P)).to(tl.int64)
    return y, y != ignore_index, (y >= 0) & (y < V)


@triton.jit
def load_shares(probabilities, weight_ptr, row, P, offs_v, V, slope, constant):
    """What each class gets of the target, besides the class index: slope t + constant, weighted. [BLOCK_V]"""
    within = offs_v < V
    q = tl.where(within, constant, 0.0)
    if probabilities is not None:
        ptrs = row_ptr(probabilities, row, P) + offs_v.to(tl.int64) * probabilities.stride_v
        q += slope * tl.load(ptrs, mask=within, other=0.0).to(q.dtype)
    if weight_ptr is not None:
        q *= tl.load(weight_ptr + offs_v, mask=within, other=0.0).to(q.dtype)
    return q


@triton.jit(do_not_specialize=["P", "V", "ignore_index"])
def cross_entropy_fwd_kernel(
    x, indices, probabilities, weight_ptr, loss_ptr, m_ptr, l_ptr,
    on: tl.float64, off: tl.float64, P, V, ignore_index,
    BLOCK_V: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_row = row_ptr(x, row, P)
    slope, constant = on.to(ACC), off.to(ACC)

    m = tl.full([], float("-inf"), ACC)
    pivot = tl.zeros([], ACC)  # m, but finite
    l = tl.zeros([], ACC)
    s = tl.zeros([], ACC)
    t = tl.zeros([], ACC)
    for v0 in tl.range(0, V, BLOCK_V):
        offs_v = v0 + tl.arange(0, BLOCK_V)
        within = offs_v < V
        x_tile = tl.load(x_row + offs_v.to(tl.int64) * x.stride_v, mask=within, other=float("-inf")).to(ACC)
        m = tl.maximum(m, tl.max(x_tile, 0))
        new_pivot = tl.where(m == float("-inf"), 0.0, m)
        l = l * tl.exp(pivot - new_pivot) + tl.sum(tl.where(within, tl.exp(x_tile - new_pivot), 0.0), 0)
        if SPREAD:
            q = load_shares(probabilities, weight_ptr, row, P, offs_v, V, slope, constant)
            t += s * (new_pivot - pivot) + tl.sum(tl.where(within, q * (new_pivot - x_tile), 0.0), 0)
            s += tl.sum(q, 0)
        pivot = new_pivot

    if indices is not None:
        y, counts, known = load_index(indices, row, P, V, ignore_index)
        q_y = slope
        if weight_ptr is not None:
            q_y *= tl.load(weight_ptr + y, mask=known, other=0.0).to(ACC)
        x_y = tl.load(x_row + y * x.stride_v, mask=known, other=0.0).to(ACC)
        s += q_y
        t += q_y * (pivot - x_y)
    loss = s * tl.log(l) + t
    if indices is not None:
        loss = tl.where(known, loss, float("nan"))
        loss = tl.where(counts, loss, 0.0)
        pivot = tl.where(counts, pivot, 0.0)
        l = tl.where(counts, l, 1.0)
    tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty))
    tl.store(m_ptr + row, pivot)
    tl.store(l_ptr + row, l)


@triton.jit(do_not_specialize=["P", "V", "ignore_index"])
def cross_entropy_bwd_kernel(
    dloss, total_ptr, x, indices, probabilities, weight_ptr, m_ptr, l_ptr, dx,
    on: tl.float64, off: tl.float64, P, V, ignore_index,
    BLOCK_V: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_row = row_ptr(x, row, P)
    slope, constant = on.to(ACC), off.to(ACC)
    m = tl.load(m_ptr + row)
    g = tl.load(row_ptr(dloss, row, P)).to(ACC)
    if total_ptr is not None:
        g = (g / tl.load(total_ptr)).to(ACC)

    s = tl.zeros([], ACC)
    if SPREAD:
        for v0 in tl.range(0, V, BLOCK_V):
            offs_v = v0 + tl.arange(0, BLOCK_V)
            s += tl.sum(load_shares(probabilities, weight_ptr, row, P, offs_v, V, slope, constant), 0)
    q_y = tl.zeros([], ACC)
    y = tl.full([], -1, tl.int64)
    if indices is not None:
        y, counts, known = load_index(indices, row, P, V, ignore_index)
        q_y = slope
        if weight_ptr is not None:
            q_y *= tl.load(weight_ptr + y, mask=known, other=0.0).to(ACC)
        q_y = tl.where(known, q_y, float("nan"))
    a = g * (s + q_y) / tl.load(l_ptr + row)

    for v0 in tl.range(0, V, BLOCK_V):
        offs_v = v0 + tl.arange(0, BLOCK_V)
        within = offs_v < V
        x_tile = tl.load(x_row + offs_v.to(tl.int64) * x.stride_v, mask=within, other=float("-inf")).to(ACC)
        d = a * tl.exp(x_tile - m)
        if SPREAD:
            d -= g * load_shares(probabilities, weight_ptr, row, P, offs_v, V, slope, constant)
        if indices is not None:
            d = tl.where(offs_v == y, d - g * q_y, d)
            d = tl.where(counts, d, 0.0)
        dx_ptrs = row_ptr(dx, row, P) + offs_v.to(tl.int64) * dx.stride_v
        tl.store(dx_ptrs, d.to(dx.ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["N", "P", "V", "ignore_index"])
def target_weights_kernel(indices, weight_ptr, out_ptr, N, P, V, ignore_index, BLOCK_N: tl.constexpr):
    """What each row counts for in the mean."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = rows < N
    y = tl.load(row_ptr(indices, rows, P), mask=within, other=0).to(tl.int64)
    known = within & (y != ignore_index) & (y >= 0) & (y < V)
    w = known.to(out_ptr.dtype.element_ty)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + y, mask=known, other=0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows, w, mask=within)


# ---- launchers -------------------------------------------------------------------------------------------------------


def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    m: Tensor,
    l: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Fills loss, m and l; the arguments mean what they do in `pyattn.reference.cross_entropy_forward`."""
    p = _Problem(input, target, weight, ignore_index, label_smoothing)
    rows = loss if reduction == "none" else torch.empty_like(m)
    with torch.cuda.device_of(input):
        if m.numel():
            cross_entropy_fwd_kernel[(m.numel(),)](*p.operands, rows, m, l, *p.scalars, **p.options)
        if reduction != "none":
            total = rows.sum(dtype=torch.float64)
            loss.copy_(total / p.total_weight() if reduction == "mean" else total)


def cross_entropy_backward(
    dloss: Tensor,
    m: Tensor,
    l: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dinput: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Fills dinput; m and l are those of the forward."""
    p = _Problem(input, target, weight, ignore_index, label_smoothing)
    dx = _fold(dinput)
    dloss = _fold(dloss.expand(m.shape).unsqueeze(min(m.dim(), 1)))
    with torch.cuda.device_of(input):
        total = p.total_weight() if reduction == "mean" else None
        if m.numel():
            x, indices, probabilities, weight = p.operands
            cross_entropy_bwd_kernel[(m.numel(),)](
                _argument(dloss), total, x, indices, probabilities, weight, m, l, _argument(dx), *p.scalars, **p.options
            )
    if dx.data_ptr() != dinput.data_ptr():
        dinput.copy_(dx.view(dinput.shape))


class _Problem:
    """What the launches of a problem's kernels have in common."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
    ) -> None:
        x = _fold(input)
        self.classes, positions = x.shape[1:]
        by_indices = not target.is_floating_point()
        folded = _argument(_fold(target.unsqueeze(min(target.dim(), 1)) if by_indices else target))
        self.indices, probabilities = (folded, None) if by_indices else (None, folded)
        self.weight = None if weight is None else weight.contiguous()
        self.operands = (_argument(x), self.indices, probabilities, self.weight)
        smooth = label_smoothing / max(self.classes, 1)
        self.positions, self.ignore_index = positions, ignore_index
        self.scalars = (1.0 - label_smoothing, smooth, positions, self.classes, ignore_index)
        self.options = {
            "BLOCK_V": min(triton.next_power_of_2(max(self.classes, 1)), MAX_BLOCK_V),
            "SPREAD": label_smoothing != 0.0 or not by_indices,
            "num_warps": NUM_WARPS if self.classes > 1024 else 1 if self.classes <= 64 else 4,
        }
        self.rows, self.device = x.shape[0] * positions, input.device

    def total_weight(self) -> Tensor:
        """What the mean divides by: 0-d float64."""
        if self.indices is None:
            return torch.full((), self.rows if self.classes else 0, dtype=torch.float64, device=self.device)
        weights = torch.empty(self.rows, dtype=torch.float64, device=self.device)
        if self.rows:
            grid = (triton.cdiv(self.rows, ROWS_BLOCK),)
            sizes = (self.rows, self.positions, self.classes, self.ignore_index)
            target_weights_kernel[grid](self.indices, self.weight, weights, *sizes, ROWS_BLOCK)
        return weights.sum()


def _fold(x: Tensor) -> Tensor:
    """[batch, classes, positions]: a view, unless the strides of its positions do not allow it."""
    if x.dim() == 1:
        return x[None, :, None]
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


def _argument(x: Tensor) -> Rows:
    return Rows(x, *x.stride())
