"""Launchers of the attention kernels: they fold batch dimensions, choose tiles, and fill the tensors they are given.

All checks came before. Tensors are taken with the strides they have; a tensor is copied only if its batch dimensions
cannot be folded into one. Launchers touch the CUDA runtime only for CUDA tensors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv
from triton import language as tl

from ._configs import DBIAS, DKDV, DQ, FORWARD, MAX_BLOCK_M, launch_options
from ._device import Tensor4
from .attention_bwd import (
    attention_bwd_dbias_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_bwd_rows_kernel,
    sum_parts_kernel,
)
from .attention_fwd import attention_fwd_kernel
from .mask_tiles import mask_tiles_kernel

# Blocks of the kernels that only pass over memory once.
ROWS_BLOCK_M, ROWS_BLOCK_DV, SUM_BLOCK = 32, 64, 1024

# The gradient of a bias that is broadcast along queries or keys has few tiles and long sums, which are cut into this
# many parts: linear in the lengths, and a constant, so that the order of summation depends on nothing else.
DBIAS_PARTS = 16


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    dropout_p: float,
    causal: bool,
    diagonal: int,
    prefix: int,
) -> None:
    """Fills out and lse; the arguments mean what they do in `pyattn.reference.attention_forward`."""
    p = _fold_problem(q, k, v, bias, mask, seed, scale, dropout_p, causal, diagonal, prefix)
    out4, lse4 = _fold(out, p.batch), _fold(lse.unsqueeze(-1), p.batch)
    with torch.cuda.device_of(q):
        _launch_forward(p, out4, lse4)
    _unfold(out4, out)
    _unfold(lse4, lse.unsqueeze(-1))


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    causal: bool,
    diagonal: int,
    prefix: int,
) -> None:
    """Fills dq, dk, dv and, unless it is None, dbias; out and lse are those of the forward."""
    p = _fold_problem(q, k, v, bias, mask, seed, scale, dropout_p, causal, diagonal, prefix)
    out4, do4, dq4, dk4, dv4 = (_fold(x, p.batch) for x in (out, do, dq, dk, dv))
    lse4, dlse4 = (None if x is None else _fold(x.unsqueeze(-1), p.batch) for x in (lse, dlse))
    with torch.cuda.device_of(q):
        lse2, delta = _launch_rows(p, out4, do4, lse4, dlse4)
        _launch_dkdv(p, do4, lse2, delta, dk4, dv4)
        _launch_dq(p, do4, lse2, delta, dq4)
        if dbias is not None:
            _launch_dbias(p, do4, lse2, delta, dbias)
    _unfold(dq4, dq)
    _unfold(dk4, dk)
    _unfold(dv4, dv)


@dataclass(frozen=True)
class _Problem:
    """A problem whose batch dimensions are folded into one, and what the launches of its kernels have in common."""

    q: Tensor  # [B, Hq, L, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    bias: Tensor | None  # [B or 1, Hq or 1, L or 1, S or 1]
    mask: Tensor | None  # likewise
    seed: Tensor | None  # None: no dropout
    scale: float
    dropout_p: float
    causal: bool
    diagonal: int
    prefix: int
    batch: torch.Size  # what was folded

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, Hq, L, S."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def acc_dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def options(self, kernel: str) -> dict[str, Any]:
        return launch_options(kernel, self.q.device, self.q.dtype, self.q.shape[3], self.v.shape[3])

    def chunks(self, options: dict[str, Any]) -> tuple[int, int]:
        """In how many programs head_dim and v_dim are split; at least one."""
        widths = ((self.q.shape[3], options["BLOCK_D"]), (self.v.shape[3], options["BLOCK_DV"]))
        return tuple(max(1, cdiv(dim, block)) for dim, block in widths)

    def broadcast(self, x: Tensor | None) -> Tensor4 | None:
        """Bias or mask with stride 0 where it is broadcast."""
        return None if x is None else _argument(x.expand(self.shape))

    def random_scalars(self) -> tuple[Tensor | None, float, int, float]:
        """seed, scale, keep_from, keep_scale, in the kernels' order."""
        p = self.dropout_p
        # The words are 32 bits wide, so p = 1 keeps one of 2^32 and multiplies it by 0.
        return self.seed, self.scale, min(int(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0

    def sizes(self) -> tuple[int, ...]:
        """group, L, S, diagonal, prefix, D, Dv, in the kernels' order."""
        _, Hq, L, S = self.shape
        group = Hq // max(1, self.k.shape[1])
        return group, L, S, self.diagonal, self.prefix, self.q.shape[3], self.v.shape[3]


def _launch_forward(p: _Problem, out: Tensor, lse: Tensor) -> None:
    B, Hq, L, _ = p.shape
    options = p.options(FORWARD)
    programs = B * Hq * cdiv(L, options["BLOCK_M"])
    if programs:
        attention_fwd_kernel[programs, p.chunks(options)[1]](
            _argument(p.q), _argument(p.k), _argument(p.v), _argument(out), _argument(lse),
            p.broadcast(p.bias), p.broadcast(p.mask), _launch_mask_tiles(p, options, by_keys=False),
            *p.random_scalars(), Hq, *p.sizes(), IS_CAUSAL=p.causal, **options,
        )  # fmt: skip


def _launch_mask_tiles(p: _Problem, options: dict[str, Any], *, by_keys: bool) -> Tensor4 | None:
    """The mask's summary by tiles of the size in `options`; None without a mask."""
    if p.mask is None:
        return None
    B, Hq, L, S = p.shape
    mask_b, mask_h, mask_l, mask_s = p.mask.shape
    num_m, num_n = cdiv(L, options["BLOCK_M"]), cdiv(S, options["BLOCK_N"])
    rows, tiles = (num_n, num_m) if by_keys else (num_m, num_n)
    # Where the mask is broadcast along a row of tiles' own axis, one list serves every row; not so under causal.
    shared = not p.causal and (mask_s if by_keys else mask_l) == 1
    own_rows = min(rows, 1) if shared else rows
    lists = torch.empty(mask_b, mask_h, own_rows, tiles + 2, dtype=torch.int32, device=p.q.device)
    if lists.numel():
        mask_tiles_kernel[mask_b * mask_h * own_rows,](
            p.broadcast(p.mask), _argument(lists), mask_h, own_rows, tiles, L, S, p.diagonal, p.prefix,
            options["BLOCK_M"], options["BLOCK_N"], IS_CAUSAL=p.causal, BY_KEYS=by_keys,
        )  # fmt: skip
    return _argument(lists.expand(B, Hq, rows, -1))


def _launch_rows(p: _Problem, out: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse in base 2, and delta, both [B, Hq, L rounded up to whole tiles, 1]."""
    B, Hq, L, _ = p.shape
    padded_L = cdiv(L, MAX_BLOCK_M) * MAX_BLOCK_M
    lse2, delta = torch.empty(2, B, Hq, padded_L, 1, dtype=p.acc_dtype, device=p.q.device)
    programs = B * Hq * cdiv(padded_L, ROWS_BLOCK_M)
    if programs:
        attention_bwd_rows_kernel[programs,](
            _argument(out), _argument(do), _argument(lse), _argument(dlse), _argument(lse2), _argument(delta),
            Hq, L, padded_L, p.v.shape[3], ROWS_BLOCK_M, ROWS_BLOCK_DV,
        )  # fmt: skip
    return lse2, delta


def _launch_dkdv(p: _Problem, do: Tensor, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    B, Hkv, S, _ = p.k.shape
    options = p.options(DKDV)
    programs = B * Hkv * cdiv(S, options["BLOCK_N"])
    if programs:
        attention_bwd_dkdv_kernel[programs, max(p.chunks(options))](
            _argument(p.q), _argument(p.k), _argument(p.v), _argument(do), _argument(dk), _argument(dv),
            _argument(lse2), _argument(delta),
            p.broadcast(p.bias), p.broadcast(p.mask), _launch_mask_tiles(p, options, by_keys=True),
            *p.random_scalars(), Hkv, *p.sizes(), IS_CAUSAL=p.causal, **options,
        )  # fmt: skip


def _launch_dq(p: _Problem, do: Tensor, lse2: Tensor, delta: Tensor, dq: Tensor) -> None:
    B, Hq, L, _ = p.shape
    options = p.options(DQ)
    programs = B * Hq * cdiv(L, options["BLOCK_M"])
    if programs:
        attention_bwd_dq_kernel[programs, p.chunks(options)[0]](
            _argument(p.q), _argument(p.k), _argument(p.v), _argument(do), _argument(dq),
            _argument(lse2), _argument(delta),
            p.broadcast(p.bias), p.broadcast(p.mask), _launch_mask_tiles(p, options, by_keys=False),
            *p.random_scalars(), Hq, *p.sizes(), IS_CAUSAL=p.causal, **options,
        )  # fmt: skip


def _launch_dbias(p: _Problem, do: Tensor, lse2: Tensor, delta: Tensor, dbias: Tensor) -> None:
    B, Hq, _, _ = p.shape
    bias_b, bias_h, bias_l, bias_s = p.bias.shape
    options = p.options(DBIAS)
    parts = DBIAS_PARTS if bias_l == 1 or bias_s == 1 else 1
    # A bias that varies along some batch dimensions only was expanded to all of them, and so is its gradient at first.
    direct = parts == 1 and dbias.numel() == p.bias.numel()
    if direct:
        sums = _fold_broadcast(dbias, p.batch)
    else:
        sums = torch.empty(parts * bias_b, bias_h, bias_l, bias_s, dtype=p.acc_dtype, device=p.q.device)

    programs = bias_b * bias_h * cdiv(bias_l, options["BLOCK_M"]) * cdiv(bias_s, options["BLOCK_N"])
    if programs:
        attention_bwd_dbias_kernel[programs, parts](
            _argument(p.q), _argument(p.k), _argument(p.v), _argument(do), _argument(sums),
            _argument(lse2), _argument(delta), p.broadcast(p.bias), p.broadcast(p.mask),
            *p.random_scalars(), B, bias_b, Hq, bias_h, *p.sizes(), IS_CAUSAL=p.causal,
            SUM_M=bias_l == 1, SUM_N=bias_s == 1, **options,
        )  # fmt: skip
    if direct:
        _unfold(sums, dbias)
        return
    total = _sum_parts(sums.view(parts, p.bias.numel())).view(p.bias.shape)
    if dbias.numel() != p.bias.numel():
        total = total.view(*p.batch, bias_h, bias_l, bias_s).sum_to_size(dbias.shape)
    dbias.copy_(total.view(dbias.shape))


def _sum_parts(parts: Tensor) -> Tensor:
    """[parts, numel] summed over parts in their order."""
    total = torch.empty_like(parts[0])
    if total.numel():
        sum_parts_kernel[cdiv(total.numel(), SUM_BLOCK),](
            parts, total, total.numel(), PARTS=len(parts), BLOCK=SUM_BLOCK
        )
    return total


def _fold_problem(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    scale: float, dropout_p: float, causal: bool, diagonal: int, prefix: int,
) -> _Problem:  # fmt: skip
    batch = q.shape[:-3]
    return _Problem(
        q=_fold(q, batch),
        k=_fold(k, batch),
        v=_fold(v, batch),
        bias=None if bias is None else _fold_broadcast(bias, batch),
        mask=None if mask is None else _fold_broadcast(mask, batch).view(torch.uint8),
        seed=seed if dropout_p > 0 else None,
        scale=scale,
        dropout_p=dropout_p,
        causal=causal,
        diagonal=diagonal,
        prefix=prefix,
        batch=batch,
    )


def _fold(x: Tensor, batch: torch.Size) -> Tensor:
    """[*batch, heads, rows, columns] with one batch dimension; a copy only where strides leave no other way."""
    return x.reshape(math.prod(batch), *x.shape[-3:])


def _unfold(x4: Tensor, x: Tensor) -> None:
    """Completes x after x4 = _fold(x) was written."""
    if x4.data_ptr() != x.data_ptr():
        x.copy_(x4.view(x.shape))


def _fold_broadcast(x: Tensor, batch: torch.Size) -> Tensor:
    """Likewise for a tensor that broadcasts to [*batch, heads, rows, columns]; its batch stays 1 if it was."""
    x = x[(None,) * (len(batch) + 3 - x.dim())]
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return _fold(x.expand(*batch, *x.shape[-3:]), batch)


def _argument(x: Tensor | None) -> Tensor4 | None:
    if x is None:
        return None
    (_, _, R, C), (stride_b, stride_h, stride_r, stride_c) = x.shape, x.stride()
    is_wide = R * stride_r + C * stride_c >= 2**31
    return Tensor4(x, stride_b, stride_h, stride_r, stride_c, tl.constexpr(is_wide))
