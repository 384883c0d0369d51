"""Calls of the Triton launchers on meta tensors, for the rungs that need no values."""

from typing import Any

import torch
from torch import Tensor

from pyattn._cross_entropy import empty_loss, empty_state
from pyattn._problem import empty_lse, empty_out
from pyattn.kernels import attention as kernels
from pyattn.kernels import cross_entropy as losses


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    dtype: torch.dtype,
    head_dim: int,
    v_dim: int | None = None,
    *,
    batch: tuple[int, ...] = (2,),
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (1024, 1024),
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    dlse: bool = False,
    dropout_p: float = 0.0,
    causal: bool = True,
    layout: Any = lambda x: x,
) -> None:
    """Forward and backward; `layout` changes the strides of q, k and v."""
    (Hq, Hkv), (L, S), v_dim = heads, lengths, head_dim if v_dim is None else v_dim
    q, k, v = (
        layout(meta(*batch, *shape, dtype=dtype)) for shape in ((Hq, L, head_dim), (Hkv, S, head_dim), (Hkv, S, v_dim))
    )
    bias_tensor = None if bias is None else meta(*bias, dtype=dtype)
    mask_tensor = None if mask is None else meta(*mask, dtype=torch.bool)
    seed = meta(dtype=torch.int64) if dropout_p else None
    arguments = {"scale": 0.125, "dropout_p": dropout_p, "causal": causal, "diagonal": S - L, "prefix": 0}
    out, lse = empty_out(q, v_dim), empty_lse(q)
    kernels.attention_forward(q, k, v, bias_tensor, mask_tensor, seed, out, lse, **arguments)
    kernels.attention_backward(
        torch.empty_like(out), torch.empty_like(lse) if dlse else None,
        q, k, v, out, lse, bias_tensor, mask_tensor, seed,
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(v),
        None if bias_tensor is None else torch.empty_like(bias_tensor), **arguments,
    )  # fmt: skip


def launch_cross_entropy(
    dtype: torch.dtype, shape: tuple[int, ...], *, probabilities: bool = False, weighted: bool = False, **options: Any
) -> None:
    """Forward and backward."""
    options = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0} | options
    input = meta(*shape, dtype=dtype)
    rows = (shape[0], *shape[2:])
    target = meta(*shape, dtype=dtype) if probabilities else meta(*rows, dtype=torch.int64)
    operands = (input, target, meta(shape[1], dtype=dtype) if weighted else None)
    loss, m, l = empty_loss(input, options["reduction"]), empty_state(input), empty_state(input)
    losses.cross_entropy_forward(*operands, loss, m, l, **options)
    losses.cross_entropy_backward(torch.empty_like(loss), m, l, *operands, torch.empty_like(input), **options)
