"""Cross-entropy as dispatcher ops, as _ops.py has attention: for graphs and fake tensors.

In a graph the kernels run at any size: torch's own function is preferred for the cost of a Python call alone.
"""

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._checks import check_dense
from ._cross_entropy import (
    CROSS_ENTROPY,
    CrossEntropyConfig,
    CrossEntropyOperands,
    check,
    empty_loss,
    empty_state,
    forward_with_state,
)
from ._ops import LIBRARY, refuse_vmap

_PROBLEM = "Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, float label_smoothing"
_N_TENSORS = len(CrossEntropyOperands._fields)

LIBRARY.define(f"cross_entropy_forward({_PROBLEM}) -> (Tensor loss, Tensor m, Tensor l)")
LIBRARY.define(f"cross_entropy_backward(Tensor dloss, Tensor m, Tensor l, {_PROBLEM}) -> Tensor dinput")


def _split(args: tuple[Any, ...]) -> tuple[CrossEntropyOperands, CrossEntropyConfig]:
    return CrossEntropyOperands(*args[:_N_TENSORS]), CrossEntropyConfig(*args[_N_TENSORS:])


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, config = _split(args)
    check(operands, config)
    return forward_with_state(operands, config)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, config = _split(args)
    check(operands, config)
    input = operands.input
    return empty_loss(input, config.reduction), empty_state(input), empty_state(input)


def _backward(dloss: Tensor, m: Tensor, l: Tensor, *args: Any) -> Tensor:
    operands, config = _split(args)
    check(operands, config)
    check_dense("gradient of the loss", dloss)
    return CROSS_ENTROPY.choose(operands, config).backward(dloss, m, l, operands, config)


def _backward_fake(dloss: Tensor, m: Tensor, l: Tensor, *args: Any) -> Tensor:
    operands, config = _split(args)
    check(operands, config)
    return torch.empty_like(operands.input)


LIBRARY.impl("cross_entropy_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("cross_entropy_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::cross_entropy_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("pyattn::cross_entropy_backward", _backward_fake, lib=LIBRARY)
torch.library.register_vmap("pyattn::cross_entropy_forward", refuse_vmap, lib=LIBRARY)
torch.library.register_vmap("pyattn::cross_entropy_backward", refuse_vmap, lib=LIBRARY)


# ---- derivatives of the ops ------------------------------------------------------------------------------------------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    operands, ctx.config = _split(inputs)
    ctx.backend = _dispatch.requested()
    _, m, l = output
    ctx.mark_non_differentiable(m, l)
    ctx.save_for_backward(*operands, m, l)


def _forward_derivative(ctx: Any, dloss: Tensor, dm: None, dl: None) -> tuple[Tensor | None, ...]:
    _refuse_other_gradients(ctx.needs_input_grad[1:_N_TENSORS])
    *tensors, m, l = ctx.saved_tensors
    with _dispatch.requesting(ctx.backend):
        dinput = torch.ops.pyattn.cross_entropy_backward(dloss, m, l, *tensors, *ctx.config)
    return dinput, *[None] * (_N_TENSORS - 1 + len(ctx.config))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dloss, _, _, *problem = inputs
    operands, ctx.config = _split(tuple(problem))
    ctx.save_for_backward(dloss, *operands)


def _backward_derivative(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """By the definition; m and l get none, since it computes them anew from input."""
    _refuse_other_gradients(ctx.needs_input_grad[4 : 3 + _N_TENSORS])
    dloss, input, target, weight = ctx.saved_tensors

    def backward(dloss: Tensor, input: Tensor) -> Tensor:
        return reference.cross_entropy_backward(dloss, input, target, weight, **ctx.config._asdict())

    ddloss, dinput = torch.func.vjp(backward, dloss, input)[1](cotangent)
    return ddloss, None, None, dinput, *[None] * (_N_TENSORS - 1 + len(ctx.config))


def _refuse_other_gradients(needed: tuple[bool, ...]) -> None:
    if any(needed):
        raise NotImplementedError(
            "torch.ops.pyattn.cross_entropy_forward has a gradient for input alone; pyattn.cross_entropy calls torch's "
            "function where the target or the weight requires one"
        )


torch.library.register_autograd(
    "pyattn::cross_entropy_forward", _forward_derivative, setup_context=_forward_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "pyattn::cross_entropy_backward", _backward_derivative, setup_context=_backward_setup, lib=LIBRARY
)
