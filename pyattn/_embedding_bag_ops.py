"""The embedding bag as dispatcher ops, as _ops.py has attention: for graphs and fake tensors.

Gradients are dense here: how many rows a sparse one has is a matter of data.
"""

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._checks import check_dense, check_seed
from ._embedding_bag import (
    EMBEDDING_BAG,
    EmbeddingBagConfig,
    EmbeddingBagOperands,
    check,
    empty_dweight,
    empty_largest,
    empty_out,
)
from ._ops import LIBRARY, refuse_vmap

_PROBLEM = (
    "Tensor weight, Tensor input, Tensor? offsets, Tensor? per_sample_weights, Tensor? mask, Tensor? lengths, "
    "Tensor? seed, str mode, SymInt? padding_idx, bool include_last_offset, bool scale_grad_by_freq, float dropout_p"
)
_N_TENSORS = len(EmbeddingBagOperands._fields)

LIBRARY.define(f"embedding_bag_forward({_PROBLEM}) -> (Tensor out, Tensor largest)")
# Of the two gradients, one that is not asked for is empty: an op cannot return None.
LIBRARY.define(
    f"embedding_bag_backward(Tensor dout, Tensor largest, {_PROBLEM}, bool weight_grad, bool weights_grad) "
    "-> (Tensor dweight, Tensor dw)"
)


def _split(args: tuple[Any, ...]) -> tuple[EmbeddingBagOperands, EmbeddingBagConfig]:
    return EmbeddingBagOperands(*args[:_N_TENSORS]), EmbeddingBagConfig(*args[_N_TENSORS:])


def _check(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> None:
    check(operands, config)
    if operands.seed is not None:
        check_seed(operands.seed, operands.weight.device)
    elif config.dropout_p > 0.0:
        raise ValueError(f"seed: dropout_p={config.dropout_p} needs a 0-d int64 tensor, got None")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    operands, config = _split(args)
    _check(operands, config)
    out, largest = EMBEDDING_BAG.choose(operands, config).forward(operands, config, with_largest=True)
    return out, empty_largest(operands, config) if largest is None else largest


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    operands, config = _split(args)
    _check(operands, config)
    return empty_out(operands, config), empty_largest(operands, config)


def _backward(dout: Tensor, largest: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *problem, weight_grad, weights_grad = args
    operands, config = _split(tuple(problem))
    _check(operands, config)
    check_dense("gradient of the output", dout)
    kernels = EMBEDDING_BAG.choose(operands, config)
    dweight = kernels.backward(dout, largest, operands, config) if weight_grad else dout.new_empty(0)
    dw = kernels.weights_backward(dout, operands, config) if weights_grad else dout.new_empty(0)
    return dweight, dw


def _backward_fake(dout: Tensor, largest: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *problem, weight_grad, weights_grad = args
    operands, config = _split(tuple(problem))
    _check(operands, config)
    dweight = empty_dweight(operands.weight) if weight_grad else dout.new_empty(0)
    return dweight, dout.new_empty(operands.input.shape) if weights_grad else dout.new_empty(0)


LIBRARY.impl("embedding_bag_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("embedding_bag_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::embedding_bag_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("pyattn::embedding_bag_backward", _backward_fake, lib=LIBRARY)
torch.library.register_vmap("pyattn::embedding_bag_forward", refuse_vmap, lib=LIBRARY)
torch.library.register_vmap("pyattn::embedding_bag_backward", refuse_vmap, lib=LIBRARY)


# ---- derivatives of the ops ------------------------------------------------------------------------------------------

_WEIGHTS = EmbeddingBagOperands._fields.index("per_sample_weights")


def _gradients(dweight: Tensor | None, dw: Tensor | None, scalars: int) -> tuple[Tensor | None, ...]:
    """For each argument of the problem: its gradient, or None."""
    tensors: list[Tensor | None] = [None] * _N_TENSORS
    tensors[0], tensors[_WEIGHTS] = dweight, dw
    return *tensors, *[None] * scalars


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    operands, ctx.config = _split(inputs)
    ctx.backend = _dispatch.requested()
    _, largest = output
    ctx.mark_non_differentiable(largest)
    ctx.save_for_backward(*operands, largest)


def _forward_derivative(ctx: Any, dout: Tensor, dlargest: None) -> tuple[Tensor | None, ...]:
    *tensors, largest = ctx.saved_tensors
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[_WEIGHTS]
    with _dispatch.requesting(ctx.backend):
        dweight, dw = torch.ops.pyattn.embedding_bag_backward(dout, largest, *tensors, *ctx.config, *needed)
    return _gradients(dweight if needed[0] else None, dw if needed[1] else None, len(ctx.config))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dout, largest, *problem, ctx.weight_grad, ctx.weights_grad = inputs
    operands, ctx.config = _split(tuple(problem))
    ctx.save_for_backward(dout, largest, *operands)


def _backward_derivative(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """By the definition."""
    dout, largest, *tensors = ctx.saved_tensors
    operands = EmbeddingBagOperands(*tensors)
    w = operands.per_sample_weights

    def backward(dout: Tensor, weight: Tensor, w: Tensor | None = None) -> tuple[Tensor, ...]:
        problem = operands._replace(weight=weight, per_sample_weights=w)
        dweight, dw = reference.embedding_bag_backward(dout, largest, *problem, **ctx.config._asdict())
        asked = ((dweight, ctx.weight_grad), (dw, ctx.weights_grad))
        return tuple(gradient for gradient, is_asked in asked if is_asked and gradient is not None)

    asked = [c for c, is_asked in zip(cotangents, (ctx.weight_grad, ctx.weights_grad), strict=True) if is_asked]
    primals = (dout, operands.weight) if w is None else (dout, operands.weight, w)
    ddout, dweight, *dw = torch.func.vjp(backward, *primals)[1](tuple(asked))
    return ddout, None, *_gradients(dweight, dw[0] if dw else None, len(ctx.config)), None, None


torch.library.register_autograd(
    "pyattn::embedding_bag_forward", _forward_derivative, setup_context=_forward_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "pyattn::embedding_bag_backward", _backward_derivative, setup_context=_backward_setup, lib=LIBRARY
)
