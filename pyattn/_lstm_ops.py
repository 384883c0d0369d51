"""The LSTM as dispatcher ops, as _ops.py has attention: for graphs and fake tensors."""

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._checks import check_dense
from ._lstm import (
    LSTM,
    LstmConfig,
    LstmOperands,
    backward_composite,
    check,
    empty_gradients,
    empty_saved,
    empty_states,
    forward_with_saved,
)
from ._ops import LIBRARY, refuse_vmap
from .rnn import per_operand

_PROBLEM = (
    "Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? lengths, bool reverse"
)
_N_TENSORS = len(LstmOperands._fields)
_N_GIVEN = 4  # what the backward takes before the problem

LIBRARY.define(f"lstm_forward({_PROBLEM}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)")
# Gradients of what is not there are empty: an op cannot return None.
LIBRARY.define(
    f"lstm_backward(Tensor? doutput, Tensor? dh_n, Tensor? dc_n, Tensor saved, {_PROBLEM}) "
    "-> (Tensor dinput, Tensor dh0, Tensor dc0, Tensor dweight_ih, Tensor dweight_hh, Tensor dbias)"
)


def _split(args: tuple[Any, ...]) -> tuple[LstmOperands, LstmConfig]:
    return LstmOperands(*args[:_N_TENSORS]), LstmConfig(*args[_N_TENSORS:])


def _forward(*args: Any) -> tuple[Tensor, ...]:
    operands, config = _split(args)
    check(operands)
    return forward_with_saved(operands, config)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _ = _split(args)
    check(operands)
    return *empty_states(operands), empty_saved(operands)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    doutput, dh_n, dc_n, saved = args[:_N_GIVEN]
    operands, config = _split(args[_N_GIVEN:])
    check(operands)
    for name, tensor in (("output", doutput), ("h_n", dh_n), ("c_n", dc_n)):
        if tensor is not None:
            check_dense(f"gradient of {name}", tensor)
    gradients = LSTM.choose(operands, config).backward((doutput, dh_n, dc_n), saved, operands, config)
    return _without_none(gradients, operands)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, _ = _split(args[_N_GIVEN:])
    check(operands)
    return _without_none(empty_gradients(operands), operands)


def _without_none(gradients: tuple[Tensor | None, ...], operands: LstmOperands) -> tuple[Tensor, ...]:
    return tuple(operands.input.new_empty(0) if x is None else x for x in gradients)


LIBRARY.impl("lstm_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lstm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::lstm_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("pyattn::lstm_backward", _backward_fake, lib=LIBRARY)
torch.library.register_vmap("pyattn::lstm_forward", refuse_vmap, lib=LIBRARY)
torch.library.register_vmap("pyattn::lstm_backward", refuse_vmap, lib=LIBRARY)


# ---- derivatives of the ops ------------------------------------------------------------------------------------------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, ctx.config = _split(inputs)
    ctx.backend = _dispatch.requested()
    saved = output[-1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, saved)


def _forward_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    operands = LstmOperands(*tensors)
    with _dispatch.requesting(ctx.backend):
        gradients = torch.ops.pyattn.lstm_backward(*cotangents[:3], saved, *operands, *ctx.config)
    dinput, dh0, dc0, *rest = gradients
    present = (dinput, None if operands.h0 is None else dh0, None if operands.c0 is None else dc0, *rest)
    return *per_operand(present, operands), None, *[None] * len(ctx.config)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, ctx.config = _split(inputs[_N_GIVEN:])
    ctx.save_for_backward(*inputs[:3], *operands)


def _backward_derivative(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """By the definition; `saved` gets none, since it computes that anew."""
    tensors = ctx.saved_tensors
    present = [i for i, x in enumerate(tensors[:-1]) if x is not None]
    lengths = tensors[-1]

    def backward(*values: Tensor) -> tuple[Tensor, ...]:
        given: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(present, values, strict=True):
            given[i] = value
        given[-1] = lengths
        operands = LstmOperands(*given[3:])  # type: ignore[arg-type]
        gradients = backward_composite((given[0], given[1], given[2]), operands, ctx.config)
        return _without_none(gradients, operands)

    pullback = torch.func.vjp(backward, *(tensors[i] for i in present))[1]
    gradients: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(present, pullback(cotangents), strict=True):
        gradients[i] = gradient
    return *gradients[:3], None, *gradients[3:], *[None] * len(ctx.config)


torch.library.register_autograd("pyattn::lstm_forward", _forward_derivative, setup_context=_forward_setup, lib=LIBRARY)
torch.library.register_autograd(
    "pyattn::lstm_backward", _backward_derivative, setup_context=_backward_setup, lib=LIBRARY
)
