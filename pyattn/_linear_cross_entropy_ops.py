"""Linear layer and cross-entropy in one as dispatcher ops, as _cross_entropy_ops.py has cross-entropy alone.

In a graph the backward makes the logits again, four products in place of three: a forward that made gradients as well
would have to know whether they will be asked for, which a graph decides later.
"""

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._checks import check_dense
from ._cross_entropy import CrossEntropyConfig
from ._linear_cross_entropy import (
    ALL,
    LINEAR_CROSS_ENTROPY,
    LinearCrossEntropyOperands,
    check,
    empty_gradients,
    empty_loss,
    empty_state,
)
from ._ops import LIBRARY, refuse_vmap

_PROBLEM = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, str reduction, "
    "int ignore_index, float label_smoothing"
)
_N_TENSORS = len(LinearCrossEntropyOperands._fields)
_DIFFERENTIABLE = (0, 1, 3)  # input, linear_weight, linear_bias

LIBRARY.define(f"linear_cross_entropy_forward({_PROBLEM}) -> (Tensor loss, Tensor m, Tensor l)")
# dlinear_bias is there even if the bias is not: an op cannot return None.
LIBRARY.define(
    f"linear_cross_entropy_backward(Tensor dloss, Tensor m, Tensor l, {_PROBLEM}) "
    "-> (Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias)"
)


def _split(args: tuple[Any, ...]) -> tuple[LinearCrossEntropyOperands, CrossEntropyConfig]:
    return LinearCrossEntropyOperands(*args[:_N_TENSORS]), CrossEntropyConfig(*args[_N_TENSORS:])


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, config = _split(args)
    check(operands, config)
    loss, m, l = LINEAR_CROSS_ENTROPY.choose(operands, config).forward(operands, config, with_state=True)
    assert m is not None and l is not None
    return loss, m, l


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, config = _split(args)
    check(operands, config)
    return empty_loss(operands, config.reduction), empty_state(operands), empty_state(operands)


def _backward(dloss: Tensor, m: Tensor, l: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    operands, config = _split(args)
    check(operands, config)
    check_dense("gradient of the loss", dloss)
    return LINEAR_CROSS_ENTROPY.choose(operands, config).backward(dloss, m, l, operands, config, ALL)


def _backward_fake(dloss: Tensor, m: Tensor, l: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    operands, config = _split(args)
    check(operands, config)
    return empty_gradients(operands, ALL)


LIBRARY.impl("linear_cross_entropy_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::linear_cross_entropy_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("pyattn::linear_cross_entropy_backward", _backward_fake, lib=LIBRARY)
torch.library.register_vmap("pyattn::linear_cross_entropy_forward", refuse_vmap, lib=LIBRARY)
torch.library.register_vmap("pyattn::linear_cross_entropy_backward", refuse_vmap, lib=LIBRARY)


# ---- derivatives of the ops ------------------------------------------------------------------------------------------


def _of_problem(gradients: tuple[Tensor | None, ...], config: CrossEntropyConfig) -> tuple[Tensor | None, ...]:
    """The gradients of input, linear_weight and linear_bias in the places of the problem's arguments."""
    dinput, dweight, dbias = gradients
    return dinput, dweight, None, dbias, None, *[None] * len(config)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    operands, ctx.config = _split(inputs)
    ctx.backend = _dispatch.requested()
    _, m, l = output
    ctx.mark_non_differentiable(m, l)
    ctx.save_for_backward(*operands, m, l)


def _forward_derivative(ctx: Any, dloss: Tensor, dm: None, dl: None) -> tuple[Tensor | None, ...]:
    _refuse_other_gradients(ctx.needs_input_grad)
    *tensors, m, l = ctx.saved_tensors
    with _dispatch.requesting(ctx.backend):
        dinput, dweight, dbias = torch.ops.pyattn.linear_cross_entropy_backward(dloss, m, l, *tensors, *ctx.config)
    has_bias = LinearCrossEntropyOperands(*tensors).linear_bias is not None
    return _of_problem((dinput, dweight, dbias if has_bias else None), ctx.config)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dloss, _, _, *problem = inputs
    operands, ctx.config = _split(tuple(problem))
    ctx.save_for_backward(dloss, *operands)


def _backward_derivative(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """By the definition; m and l get none, since it computes them anew."""
    _refuse_other_gradients(ctx.needs_input_grad[3:])
    dloss, *tensors = ctx.saved_tensors
    operands = LinearCrossEntropyOperands(*tensors)
    leaves = [dloss, *(tensors[i] for i in _DIFFERENTIABLE if tensors[i] is not None)]

    def backward(dloss: Tensor, input: Tensor, linear_weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        problem = operands._replace(input=input, linear_weight=linear_weight, linear_bias=bias[0] if bias else None)
        return reference.linear_cross_entropy_backward(dloss, *problem, **ctx.config._asdict())

    ddloss, dinput, dweight, *dbias = torch.func.vjp(backward, *leaves)[1](cotangents)
    return ddloss, None, None, *_of_problem((dinput, dweight, dbias[0] if dbias else None), ctx.config)


def _refuse_other_gradients(needed: tuple[bool, ...]) -> None:
    if any(needed[i] for i in range(_N_TENSORS) if i not in _DIFFERENTIABLE):
        raise NotImplementedError(
            "torch.ops.pyattn.linear_cross_entropy_forward has gradients for input, linear_weight and linear_bias "
            "alone; pyattn.linear_cross_entropy calls torch's functions where the target or the weight requires one"
        )


torch.library.register_autograd(
    "pyattn::linear_cross_entropy_forward", _forward_derivative, setup_context=_forward_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "pyattn::linear_cross_entropy_backward", _backward_derivative, setup_context=_backward_setup, lib=LIBRARY
)
