"""Recurrent layers: the public functions, and their derivative in eager mode.

As for attention: a call is checked, given to a backend, and differentiated by the backend's own backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _C, _dispatch
from ._lstm import (
    LSTM,
    LstmConfig,
    LstmOperands,
    States,
    backward_composite,
    check,
    torch_lstm,
)
from ._types import typed


@typed
def lstm(
    input: Float[Tensor, "batch seq features"],
    weight_ih: Float[Tensor, "gates features"],
    weight_hh: Float[Tensor, "gates hidden"],
    bias_ih: Float[Tensor, " gates"] | None = None,
    bias_hh: Float[Tensor, " gates"] | None = None,
    *,
    h0: Float[Tensor, "batch hidden"] | None = None,
    c0: Float[Tensor, "batch hidden"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]:
    """One layer of an LSTM in one direction, over sequences of different length; `nn.LSTM` stacks it.

    At each step, with the gates i, f, g, o in this order along the rows of the weights::

        i, f, g, o = weight_ih x + bias_ih + weight_hh h + bias_hh
        c = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c)

    Args:
        input: x of every step; float32, bfloat16, float16 or float64, any strides.
        weight_ih, weight_hh: as torch.nn.LSTM has them; gates is 4 hidden.
        bias_ih, bias_hh: either may be missing.
        h0, c0: the state before the first step; None is zeros.
        lengths: how many steps of each sample there are, int64 or int32 in [0, seq]; None: all seq.
        reverse: from the last valid step to the first.

    Returns:
        The h of every step, in input's order of batch and steps in memory; and h and c after the last valid step
        (with `reverse`: after the first). All in input's dtype.

    Numerics:
        Half types are computed in float32 and rounded once, at the end: the state is carried unrounded from step to
        step. On the CPU a sample's output, state and gradients are bitwise the same for any number of threads, in any
        batch and however widely padded; the gradients of the weights, for any number of threads and padding.

    Corner cases:
        * Steps beyond a length do not exist: they take no time, their output is 0, and whatever their input holds
          reaches nothing. A sample of length 0 ends in the state it starts in.
        * The second derivative is that of the definition, a loop over the steps in PyTorch. Under torch.func's
          transforms and forward mode AD the kernels refuse; `use_backend("reference")` runs the definition there.
        * On CUDA torch's own function runs, and `pyattn.explain` says so.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
        ValueError: a length is not in [0, seq].
        NotImplementedError: no backend takes the problem.

    References:
        Hochreiter and Schmidhuber, "Long short-term memory", 1997; with the forget gate of Gers et al., "Learning to
        forget", 2000.

    >>> x, w_ih, w_hh = torch.randn(8, 100, 64), torch.randn(512, 64) / 8, torch.randn(512, 128) / 12
    >>> output, h_n, c_n = lstm(x, w_ih, w_hh, lengths=torch.arange(0, 80, 10))
    >>> output.shape, h_n.shape
    (torch.Size([8, 100, 128]), torch.Size([8, 128]))
    """
    operands = LstmOperands(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths)
    config = LstmConfig(reverse)
    if torch.compiler.is_compiling():
        return _call_op(operands, config)
    if LSTM.prefers_torch(operands, config):
        return torch_lstm(operands, config)

    check(operands)
    operands = _autocast(operands)
    if input.is_meta:
        return _call_op(operands, config)
    kernels = LSTM.choose(operands, config)
    if _dispatch.under_transforms():
        return kernels.forward(operands, config, with_saved=False)[0]
    plain = _C.plain(*operands)
    if not plain or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return _call_op(operands, config)
    if plain == _WITH_GRAD and torch.is_grad_enabled():
        return _apply_lstm(*operands[:_DIFFERENTIABLE], operands, config, kernels)
    return kernels.forward(operands, config, with_saved=False)[0]


_WITH_GRAD = 2  # _C.plain: an operand requires grad
_DIFFERENTIABLE = LstmOperands._fields.index("lengths")


def _call_op(operands: LstmOperands, config: LstmConfig) -> States:
    """The dispatcher's way, for everything that has no data of its own: graphs, fake tensors, subclasses, modes."""
    output, h_n, c_n, _ = torch.ops.pyattn.lstm_forward(*_autocast(operands), *config)
    return output, h_n, c_n


def _autocast(operands: LstmOperands) -> LstmOperands:
    """As torch does under autocast: everything is cast inside autograd, float64 excepted."""
    device = operands.input.device.type
    if operands.input.is_meta or not torch.is_autocast_enabled(device) or operands.input.dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(device)
    cast: dict[str, Any] = {
        name: x if x is None or name == "lengths" else x.to(dtype) for name, x in operands._asdict().items()
    }
    return LstmOperands(**cast)


class _Lstm(torch.autograd.Function):
    """The derivative in eager mode, `ctx` in `forward` as in attention.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> States:
        # The operands hold the tensors before them, which stand alone because autograd looks no deeper.
        *_, operands, config, kernels = args
        states, saved = kernels.forward(operands, config, with_saved=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, saved)
        ctx.config, ctx.kernels = config, kernels
        return states  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        doutput, dh_n, dc_n = grads
        *tensors, saved = ctx.saved_tensors
        operands, kernels = LstmOperands(*tensors), ctx.kernels
        direct = _C.plain(*grads, saved, *operands) and not (
            torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or _dispatch.under_transforms()
        )
        if direct:
            gradients = kernels.backward((doutput, dh_n, dc_n), saved, operands, ctx.config)
        else:  # the backward is itself differentiated, mapped or traced: its definition can be
            gradients = backward_composite((doutput, dh_n, dc_n), operands, ctx.config)
        return *per_operand(gradients, operands), None, None, None


def per_operand(gradients: tuple[Tensor | None, ...], operands: LstmOperands) -> tuple[Tensor | None, ...]:
    """The gradient of each differentiable operand: that of the biases is one and the same."""
    *others, dbias = gradients
    return *others, *(None if bias is None else dbias for bias in (operands.bias_ih, operands.bias_hh))


# Past Function.apply's own look for torch.func's transforms, as in attention.py: kernels refuse to run under them.
_function_base: Any = super(torch.autograd.Function, _Lstm)
_apply_lstm: Callable[..., States] = _function_base.apply
