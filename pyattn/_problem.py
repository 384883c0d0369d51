"""One attention problem in the terms of the dispatcher op: its tensors, its scalars, and the tensors it returns.

The fields of the two tuples stand in the order of the op's schema; csrc/operands.cpp and csrc/bind_attention-inl.h
read them by position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .masks import LOWER_RIGHT, check_causal


class Operands(NamedTuple):
    """The op's tensor arguments, in the order of its schema."""

    q: Tensor  # [*batch, q_heads, q_len, head_dim]
    k: Tensor  # [*batch, kv_heads, kv_len, head_dim]
    v: Tensor  # [*batch, kv_heads, kv_len, v_dim]
    bias: Tensor | None = None  # broadcasts to [*batch, q_heads, q_len, kv_len]
    sinks: Tensor | None = None  # [q_heads]
    mask: Tensor | None = None  # bool, True = attend; broadcasts as the bias
    lengths: Tensor | None = None
    starts: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    seed: Tensor | None = None  # 0-d int64, there iff dropout_p > 0

    def kernel_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Those that the reference and the Triton kernels take; `check` refuses the others."""
        return self.q, self.k, self.v, self.bias, self.mask, self.seed


class AttentionConfig(NamedTuple):
    """The op's scalar arguments, in the order of its schema; plain Python numbers, so that a graph can hold them."""

    scale: float
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    align: int = 0
    left: int | None = None  # window in keys to each side of the diagonal; None: unbounded
    right: int | None = None  # 0: causal
    prefix: int = 0


class KernelArguments(NamedTuple):
    """What the reference and the Triton kernels take after the tensors; the meaning is stated in reference.py."""

    scale: float
    dropout_p: float
    causal: bool
    diagonal: int
    prefix: int


def kernel_arguments(operands: Operands, config: AttentionConfig) -> KernelArguments:
    diagonal = operands.k.shape[-2] - operands.q.shape[-2] if config.align == LOWER_RIGHT else 0
    return KernelArguments(float(config.scale), config.dropout_p, config.right is not None, diagonal, config.prefix)


def check(operands: Operands, config: AttentionConfig, names: _checks.Names = _checks.NAMES) -> None:
    """All that can be known before a kernel runs; the op may be called without the typed front."""
    o, c = operands, config
    _checks.check_supported(o.sinks, o.lengths, o.starts, o.q_segments, o.kv_segments, c.softcap, c.left, c.right)
    check_causal(c.align, c.right, c.prefix)
    _checks.check_attention(o.q, o.k, o.v, o.bias, o.mask, names)
    _checks.check_scale(c.scale, o.q.dtype)
    _checks.check_dropout_p(c.dropout_p)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def empty_out(q: Tensor, v_dim: int) -> Tensor:
    """The output: q's dtype, and q's order of dimensions in memory (contiguous where q has no dense order)."""
    if q.shape[-1] == v_dim:
        return torch.empty_like(q)
    # Expanded and overlapping queries have no order of their own; empty_like decides for both branches.
    order = sorted(range(q.dim()), key=torch.empty_like(q, device="meta").stride, reverse=True)
    return torch.empty_permuted((*q.shape[:-1], v_dim), order, dtype=q.dtype, device=q.device)


def empty_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:-1], dtype=_checks.accumulation_dtype(q.dtype), device=q.device)


def empty_gradients(operands: Operands, bias_grad: bool) -> Gradients:
    """Of q, k, v and, if asked for, bias: each like its operand."""
    q, k, v, bias = operands[:4]
    dbias = torch.empty_like(bias) if bias_grad and bias is not None else None
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias
