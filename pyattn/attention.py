"""Scaled dot-product attention: the public functions, and their derivative in eager mode.

A call is checked, normalised to the op's operands and scalars, given to a backend, and restored to the caller's shape.
The arithmetic is in reference.py (the definition), csrc/ (CPU) and kernels/ (GPU); nothing here depends on the device.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from . import _C, _dispatch, reference
from ._attention_backends import ATTENTION, AttentionKernels
from ._checks import NAMES, Names, ShapeError, check_dropout_p, check_seed
from ._problem import AttentionConfig, Operands, check
from ._seed import seed_for, seed_tensor
from ._transforms import Transformable, transformable_backward
from ._types import typed
from .masks import UPPER_LEFT, LoweredMask, Mask, lower


@typed
def attention(
    query: Float[Tensor, "*batch q_heads q_len head_dim"],
    key: Float[Tensor, "*batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "*batch kv_heads kv_len v_dim"],
    *,
    mask: Mask | Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    dropout_p: float | int = 0.0,
    dropout_seed: int | Int[Tensor, ""] | None = None,
) -> Float[Tensor, "*batch q_heads q_len v_dim"]:
    """Scaled dot-product attention, exact, in O(q_len + kv_len) memory, forward and backward.

    ``out = dropout(softmax(scale * query @ key^T + bias)) @ value``, the softmax over the keys that `mask` lets a query
    attend to.

    Args:
        query, key, value: float32, bfloat16, float16 or float64, one dtype and device for all; any strides, any
            head_dim and v_dim, any sizes, 0 included. q_heads is a multiple of kv_heads; query head h reads key/value
            head ``h // (q_heads // kv_heads)`` (grouped-query attention needs no flag).
        mask: which keys a query attends to: `Causal`, a bool tensor (True = attend) that broadcasts from the right to
            ``[*batch, q_heads, q_len, kv_len]``, or several joined by ``&``.
        bias: added to the scaled scores; broadcasts like a bool mask; query's dtype, or float32. Has a gradient of its
            own dtype and shape. -inf masks.
        scale: factor of the scores; default ``1 / sqrt(head_dim)``. May be negative. ``scale * key``, the derivative of
            the scores for the query, has to be in float32's range (float64's for float64).
        softcap, sinks: part of the contract, not computed yet: anything but None (and 0 for softcap, which is
            none) raises NotImplementedError.
        dropout_p: probability that an attention weight is dropped; the kept ones are scaled by ``1 / (1 - p)``.
        dropout_seed: determines the dropout mask, which `dropout_mask` returns; an int or a 0-d int64 tensor on the
            query's device. None draws one from torch's generator of that device.

    Returns:
        The output in query's dtype, with query's order of dimensions in memory.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64); the output is rounded once. On the CPU the result is
        bitwise the same for any number of threads and whatever else is in the batch.

    Corner cases:
        * A query with nothing to attend to gives 0, and gradients 0; so does kv_len = 0.
        * Masked positions do not exist: a NaN or infinity in a masked key or value reaches neither the output nor any
          gradient. An attended one makes the query's row non-finite.
        * ``Causal`` needs an alignment when q_len != kv_len::

              upper_left    1 0 0 0      lower_right   1 1 1 0      (q_len 2, kv_len 4)
                            1 1 0 0                    1 1 1 1

    Raises:
        ShapeError, DtypeError, DeviceError: an operand does not fit the others.
        ValueError: an argument is out of its range, or a causal mask of ambiguous alignment.
        NotImplementedError: no backend takes the problem; the message has each one's reasons.

    References:
        Vaswani et al., "Attention is all you need", 2017, section 3.2.1 (d_k is head_dim). Tiled as in Dao,
        "FlashAttention-2", 2023, algorithms 1 and 2. Dropout by Philox4x32-10, see `dropout_mask`.

    >>> q, k, v = torch.randn(3, 2, 4, 16, 32).unbind()
    >>> attention(q, k, v, mask=Causal()).shape
    torch.Size([2, 4, 16, 32])
    """
    return _attend(query, key, value, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed)[0]


@typed
def attention_with_lse(
    query: Float[Tensor, "*batch q_heads q_len head_dim"],
    key: Float[Tensor, "*batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "*batch kv_heads kv_len v_dim"],
    *,
    mask: Mask | Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    dropout_p: float | int = 0.0,
    dropout_seed: int | Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "*batch q_heads q_len v_dim"], Float[Tensor, "*batch q_heads q_len"]]:
    """`attention`, and the log-sum-exp of each query's scores; both are differentiable.

    ``lse = log(sum over attended keys of exp(score))``, natural logarithm, float32 (float64 for float64), without
    dropout; -inf for a query with nothing to attend to. Arguments and errors are those of `attention`.
    """
    return _attend(query, key, value, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, with_lse=True)


@typed
def scaled_dot_product_attention(
    query: Float[Tensor, "*q_batch q_len head_dim"],
    key: Float[Tensor, "*k_batch kv_len head_dim"],
    value: Float[Tensor, "*v_batch kv_len v_dim"],
    attn_mask: Shaped[Tensor, "..."] | None = None,
    dropout_p: float | int = 0.0,
    is_causal: bool = False,
    *,
    scale: float | int | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*out_batch q_len v_dim"]:
    """`torch.nn.functional.scaled_dot_product_attention`: its signature, semantics and defaults, on pyattn's kernels.

    Args:
        query, key, value: two or more dimensions; those before the last two broadcast. With `enable_gqa`, the third
            from the right is heads, and query's number of them a multiple of key's and value's.
        attn_mask: bool (True = attend) or float (added to the scores; has a gradient); broadcasts to
            ``[..., q_len, kv_len]``.
        dropout_p: applied whenever it is not 0, as torch does: pass 0 in evaluation.
        is_causal: query i attends to keys up to i, counted from the upper left corner, whatever the lengths.
        scale: default ``1 / sqrt(head_dim)``.

    Corner cases:
        As `attention`. Two deliberate differences from torch's CPU kernels: `attn_mask` together with `is_causal` is
        the error that torch documents, and a value longer or shorter than key is an error (torch 2.13 reads outside
        the key).

    Raises:
        RuntimeError: `attn_mask` together with `is_causal`.
        ShapeError, DtypeError, DeviceError, ValueError, NotImplementedError: as `attention`.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention: explicit attn_mask should not be set when is_causal=True; "
            "pyattn.attention(mask=Causal(...) & attn_mask) takes both"
        )
    matrices = query.dim() == key.dim() == value.dim() == 2
    if query.shape != key.shape or key.shape != value.shape or query.dim() < 3:  # else there is nothing to broadcast
        query, key, value = _broadcast_batch(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask
    else:
        bias = attn_mask
    out = _attend(query, key, value, mask, bias, scale, dropout_p=dropout_p, is_causal=is_causal, names=_SDPA_NAMES)[0]
    return out.squeeze(0) if matrices else out


@typed
def compute_attention(
    query: Float[Tensor, "batch q_len d_model"],
    key: Float[Tensor, "batch kv_len d_model"],
    value: Float[Tensor, "batch kv_len d_value"],
    mask: Shaped[Tensor, "..."] | None = None,
) -> Float[Tensor, "batch q_len d_value"]:
    """Attention of one head: ``softmax(query @ key^T / sqrt(d_model), where mask != 0) @ value``.

    Args:
        query, key, value: ``[batch, length, d_model]``; value's last dimension may differ.
        mask: any dtype, broadcasts to ``[batch, q_len, kv_len]``; a key with ``mask == 0`` is not attended to.

    Corner cases, errors:
        As `attention`: a query whose keys are all masked gives 0 (the plain formula gives NaN).
    """
    # The op broadcasts heads exactly as this function's mask broadcasts batch, so batch stands in their place.
    attend = None if mask is None else mask if mask.dtype == torch.bool else mask != 0
    return _attend(query, key, value, attend, names=_ONE_HEAD_NAMES)[0]


@typed
def dropout_mask(
    dropout_seed: int | Int[Tensor, ""],
    dropout_p: float | int,
    *,
    batch: int,
    q_heads: int,
    q_len: int,
    kv_len: int,
) -> Bool[Tensor, "{batch} {q_heads} {q_len} {kv_len}"]:
    """The attention weights that dropout keeps: what every backend uses for this seed, whatever its tiling.

    Philox4x32-10 with key = the seed's two halves and counter = (key // 4, query, q_head, flat batch index); a weight
    is kept iff word ``key % 4`` is at least ``floor(p * 2^32)``.

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 5.3.
    """
    check_dropout_p(dropout_p)
    for name, size in (("batch", batch), ("q_heads", q_heads), ("q_len", q_len), ("kv_len", kv_len)):
        if size < 0:
            raise ValueError(f"{name}: expected a size, 0 or more, got {size}")
    device = dropout_seed.device if isinstance(dropout_seed, Tensor) else torch.device("cpu")
    check_seed(dropout_seed, device)
    seed = seed_tensor(dropout_seed, device)
    return reference.dropout_mask(seed, dropout_p, batch, q_heads, q_len, kv_len)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    *,
    is_causal: bool = False,
    with_lse: bool = False,
    names: Names = NAMES,
) -> tuple[Tensor, Any]:
    """Check, normalise, choose, call. The second result is the log-sum-exp, which may be None without `with_lse`."""
    dynamo = torch.compiler.is_dynamo_compiling()
    if dynamo or torch._C._is_any_autocast_enabled():
        query, key, value = (_autocast(x, query) for x in (query, key, value))
        bias = None if bias is None else _autocast(bias, query)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] or 1)
    if mask is None:
        lowered = _UPPER_LEFT_TRIANGLE if is_causal else _EVERYTHING
    else:
        lowered = lower(mask, query.shape[-2], key.shape[-2])
    allowed, align, left, right, prefix = lowered
    config = AttentionConfig(scale, softcap or 0.0, dropout_p, align, left, right, prefix)
    operands = Operands(query, key, value, bias, sinks, allowed)
    if dropout_seed is not None:
        check_seed(dropout_seed, query.device)
    if dynamo:
        return _call_op(operands, config, dropout_seed)

    # The checks are made in C++, in 0.5 us; check() makes them again where the answer is no, to find the words.
    ready = _C.attention_ready(operands, config)
    if not ready:
        check(operands, config, names)
        if query.is_meta:
            return _call_op(operands, config, dropout_seed)
    kernels = ATTENTION.choose(operands, config)
    if _dispatch.under_transforms():
        seed = seed_for(dropout_p, dropout_seed, query.device)
        return Transformable.apply(query, key, value, bias, allowed, seed, config)  # type: ignore[no-any-return, no-untyped-call]
    if not ready or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return _call_op(operands, config, dropout_seed)
    if dropout_p > 0.0:
        operands = operands._replace(seed=seed_for(dropout_p, dropout_seed, query.device))
    if ready == _WITH_GRAD and torch.is_grad_enabled():
        return _apply_attention(query, key, value, bias, operands, config, kernels)
    return kernels.forward(operands, config, with_lse)


_SDPA_NAMES = Names(bias="attn_mask", mask="attn_mask")
_ONE_HEAD_NAMES = Names(heads="batch")
_EVERYTHING, _UPPER_LEFT_TRIANGLE = LoweredMask(), LoweredMask(align=UPPER_LEFT, right=0)
_WITH_GRAD = 2  # _C.attention_ready: an operand requires grad


def _call_op(operands: Operands, config: AttentionConfig, dropout_seed: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """The dispatcher's way, for everything that has no data of its own: graphs, fake tensors, subclasses, modes."""
    operands = operands._replace(seed=seed_for(config.dropout_p, dropout_seed, operands.q.device))
    return torch.ops.pyattn.attention_forward(*operands, *config)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """The derivative in eager mode; `ctx` in `forward` costs 12 us a call, the `setup_context` style 50."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        operands: Operands,  # holds the four before it, which stand alone because autograd looks no deeper
        config: AttentionConfig,
        kernels: AttentionKernels,
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = kernels.forward(operands, config, with_lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, out, lse)
        ctx.config, ctx.kernels = config, kernels
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        do, dlse = grads
        *tensors, out, lse = ctx.saved_tensors
        config, kernels = ctx.config, ctx.kernels
        bias_grad = tensors[3] is not None and ctx.needs_input_grad[3]
        do = torch.zeros_like(out) if do is None else do
        # The gradients come from outside, and the saved tensors through hooks: what was plain may not be so now.
        direct = _C.plain(do, dlse, out, lse, *tensors) and not (
            torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or _dispatch.under_transforms()
        )
        if direct:
            dq, dk, dv, dbias = kernels.backward(do, dlse, out, lse, Operands(*tensors), config, bias_grad)
        else:
            dq, dk, dv, dbias = _indirect_backward(do, dlse, out, lse, Operands(*tensors), config, kernels, bias_grad)
        return dq, dk, dv, dbias, None, None, None


# What Function.apply itself calls once it has found no torch.func transform active and no wrapper left over from one.
# _attend has seen to both (such a wrapper has no memory, so it is not plain), which leaves 5 us of the 12.
_function_base: Any = super(torch.autograd.Function, _Attention)
_apply_attention: Callable[..., tuple[Tensor, Tensor]] = _function_base.apply


def _indirect_backward(
    do: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    operands: Operands,
    config: AttentionConfig,
    kernels: AttentionKernels,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """The backward of `_Attention` where it is itself differentiated, mapped, or traced."""
    with _dispatch.requesting(kernels.backend.name):
        if _dispatch.under_transforms():
            dlse = torch.zeros_like(lse) if dlse is None else dlse
            q, k, v, bias = operands[:4]
            mask, seed = operands.mask, operands.seed
            return transformable_backward(do, dlse, out, lse, q, k, v, bias, mask, seed, config, bias_grad)
        dq, dk, dv, dbias, _ = torch.ops.pyattn.attention_backward(do, dlse, out, lse, *operands, *config, bias_grad)
        return dq, dk, dv, dbias if bias_grad else None


def _autocast(tensor: Tensor, query: Tensor) -> Tensor:
    """As torch's SDPA does under autocast: to the autocast dtype, float64 excepted, inside autograd."""
    if tensor.dtype == torch.float64 or query.is_meta or not torch.is_autocast_enabled(query.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(query.device.type))


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[Tensor]:
    """Views whose batch dimensions are broadcast as torch.matmul does; heads too, where they are not groups."""
    operands = [x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value)]
    rank = 3 if enable_gqa else 2
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-rank] for x in operands))
    except RuntimeError as error:
        shapes = ", ".join(
            f"{name} {tuple(x.shape)}" for name, x in zip(("query", "key", "value"), operands, strict=True)
        )
        hint = "" if enable_gqa else "; enable_gqa=True groups query heads over fewer key and value heads"
        raise ShapeError(f"query, key, value: batch dimensions do not broadcast: {shapes}{hint}") from error
    return [x.expand(*lead, *x.shape[-rank:]) for x in operands]
