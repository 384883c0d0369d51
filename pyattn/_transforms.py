"""Attention under torch.func and forward-mode AD: grad, vmap, jvp, hessian, in any nesting.

A pair of autograd.Functions, one for the forward and one for its backward, in `setup_context` style with static vmap
and jvp. Plain eager calls do not come here: this style costs 50 us a call against 5 (see attention.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, _dispatch
from ._attention_backends import ATTENTION, forward_with_lse
from ._composite import backward_jvp, backward_vjp, forward_jvp
from ._problem import AttentionConfig, Gradients, Operands

InDims = tuple[int | None, ...]


def _operands(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None
) -> Operands:
    return Operands(q, k, v, bias=bias, mask=mask, seed=seed)


class Transformable(torch.autograd.Function):
    """(out, lse) of the six tensors that differ from None, and a config."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        config: AttentionConfig,
    ) -> tuple[Tensor, Tensor]:
        operands = _operands(q, k, v, bias, mask, seed)
        if not _C.plain(q, k, v, bias, mask, seed):
            out, lse = torch.ops.pyattn.attention_forward(*operands, *config)
            return out, lse
        return forward_with_lse(operands, config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.config = inputs
        ctx.backend = _dispatch.requested()
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        with _dispatch.requesting(ctx.backend):
            bias_grad = ctx.needs_input_grad[3]
            gradients = transformable_backward(*grads, out, lse, *tensors, ctx.config, bias_grad)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        return forward_jvp(tangents[:4], _operands(*ctx.saved_tensors), ctx.config)

    @staticmethod
    def vmap(info: Any, in_dims: InDims, *args: Any) -> tuple[Any, Any]:
        return _vmap(Transformable.apply, info.batch_size, in_dims, args, query=0), (0, 0)


def transformable_backward(*args: Any) -> Gradients:
    """From do, dlse, out, lse, the six tensors, the config, and whether the bias needs its gradient."""
    *inputs, bias_grad = args
    dq, dk, dv, *dbias = _TransformableBackward.apply(bias_grad, *inputs)  # type: ignore[no-untyped-call]
    return dq, dk, dv, dbias[0] if bias_grad else None


class _TransformableBackward(torch.autograd.Function):
    """(dq, dk, dv) and, if it is asked for, dbias."""

    @staticmethod
    def forward(bias_grad: bool, do: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *tensors, config = args
        operands = _operands(*tensors)
        if _C.plain(do, dlse, out, lse, *tensors):
            kernels = ATTENTION.choose(operands, config)
            dq, dk, dv, dbias = kernels.backward(do, dlse, out, lse, operands, config, bias_grad)
        else:
            dq, dk, dv, dbias, _ = torch.ops.pyattn.attention_backward(
                do, dlse, out, lse, *operands, *config, bias_grad
            )
        return (dq, dk, dv, dbias) if bias_grad else (dq, dk, dv)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.bias_grad, do, dlse, _, _, *tensors, ctx.config = inputs
        ctx.save_for_backward(do, dlse, *tensors)
        ctx.save_for_forward(do, dlse, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        do, dlse, *tensors = ctx.saved_tensors
        do, dlse, dq, dk, dv, dbias = backward_vjp(cotangents, do, dlse, _operands(*tensors), ctx.config)
        return None, do, dlse, None, None, dq, dk, dv, dbias, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        do, dlse, *tensors = ctx.saved_tensors
        # Those of out and lse (3, 4) are left out: the composite recomputes both from q, k, v and bias.
        tangents = (*tangents[1:3], *tangents[5:9])
        return backward_jvp(tangents, do, dlse, _operands(*tensors), ctx.config)[: 3 + ctx.bias_grad]

    @staticmethod
    def vmap(info: Any, in_dims: InDims, *args: Any) -> tuple[Any, Any]:
        bias_grad, *inputs = args
        apply = functools.partial(_TransformableBackward.apply, bias_grad)
        grads = _vmap(apply, info.batch_size, in_dims[1:], inputs, query=4)
        return grads, (0,) * len(grads)


def _vmap(apply: Callable[..., Any], size: int, in_dims: InDims, args: Sequence[Any], query: int) -> Any:
    """The mapped axis becomes the first batch dimension, which costs no copy: the op takes any number of them.

    Under dropout it cannot: the mask is a function of the position in the batch, and mapping must give what a loop
    would give. So there it is a loop.
    """
    *tensors, config = args
    if size == 0:  # nothing to loop over, and nothing to drop
        config = config._replace(dropout_p=0.0)
    if config.dropout_p > 0.0:
        results = [
            apply(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=False)), config)
            for i in range(size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    *tensors, _ = tensors  # without dropout, no seed
    rank = tensors[query].dim() - (in_dims[query] is not None)
    leading = [
        # bias and mask follow q, k and v, and may have fewer dimensions than they: the new one goes before all.
        _lead(tensor, dim, size, rank if index > query + 2 else 0)
        for index, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=False))
    ]
    return apply(*leading, None, config)


def _lead(tensor: Tensor | None, dim: int | None, size: int, rank: int) -> Tensor | None:
    """A view with the mapped axis first, then axes of size 1 up to `rank` others."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    missing = max(rank - (mapped.dim() - 1), 0)
    return mapped[(slice(None), *[None] * missing)]
