"""Attention as dispatcher ops, for everything that is not a plain eager call: torch.compile, torch.export, FakeTensor.

The ops are defined through torch.library.Library, not custom_op: 2-6 us a call against 9, and no 2 s import of
torch._dynamo at the first one. Derivatives of the ops cover compiled graphs and create_graph; torch.func's transforms
have `Transformable`, a pair of autograd.Functions, because an op's registered derivative raises under grad and is
silently zero under jvp (torch 2.13), so the ops refuse to run there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _dispatch
from ._attention_backends import ATTENTION, forward_with_lse
from ._checks import check_dense, check_seed
from ._composite import backward_vjp
from ._problem import AttentionConfig, Operands, check, empty_lse, empty_out

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? lengths, Tensor? starts, "
    "Tensor? q_segments, Tensor? kv_segments, Tensor? seed"
)
_SCALARS = "float scale, float softcap, float dropout_p, int align, SymInt? left, SymInt? right, SymInt prefix"
_N_TENSORS = len(Operands._fields)

LIBRARY = torch.library.Library("pyattn", "DEF")
LIBRARY.define(f"attention_forward({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor lse)")
# dbias and dsinks are empty unless asked for: an op cannot return None.
LIBRARY.define(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor out, Tensor lse, {_TENSORS}, {_SCALARS}, bool bias_grad) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


def _split(args: tuple[Any, ...]) -> tuple[Operands, AttentionConfig]:
    """The schema's common tail of arguments as the two tuples the package passes around."""
    return Operands(*args[:_N_TENSORS]), AttentionConfig(*args[_N_TENSORS:])


def _check(operands: Operands, config: AttentionConfig) -> None:
    # Under a forward-AD level the op's tangents would be dropped without a word: attention() routes such calls to
    # Transformable, so arriving here means the bare op, or a compiled graph that differentiates forward.
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "torch.ops.pyattn has no forward-mode derivative; call pyattn.attention outside torch.compile under "
            "torch.func.jvp or torch.autograd.forward_ad"
        )
    check(operands, config)
    if operands.seed is not None:
        check_seed(operands.seed, operands.q.device)
    elif config.dropout_p > 0.0:
        raise ValueError(f"seed: dropout_p={config.dropout_p} needs a 0-d int64 tensor, got None")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    operands, config = _split(args)
    _check(operands, config)
    return forward_with_lse(operands, config)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    operands, config = _split(args)
    _check(operands, config)
    return empty_out(operands.q, operands.v.shape[-1]), empty_lse(operands.q)


def _backward(
    do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands, config = _split(args[:-1])
    _check(operands, config)
    check_dense("gradient of the output", do)
    kernels = ATTENTION.choose(operands, config)
    dq, dk, dv, dbias = kernels.backward(do, dlse, out, lse, operands, config, bias_grad=args[-1])
    return dq, dk, dv, do.new_empty(0) if dbias is None else dbias, do.new_empty(0)


def _backward_fake(
    do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands, config = _split(args[:-1])
    _check(operands, config)
    with_bias = args[-1] and operands.bias is not None
    dbias = torch.empty_like(operands.bias) if with_bias else do.new_empty(0)  # type: ignore[arg-type]
    q, k, v = operands.q, operands.k, operands.v
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, do.new_empty(0)


# One implementation for all devices: which backend runs is decided by _dispatch, with reasons, not by a dispatch key.
LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::attention_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("pyattn::attention_backward", _backward_fake, lib=LIBRARY)


def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise NotImplementedError("torch.ops.pyattn has no batching rule; call pyattn's functions under torch.vmap")


torch.library.register_vmap("pyattn::attention_forward", refuse_vmap, lib=LIBRARY)
torch.library.register_vmap("pyattn::attention_backward", refuse_vmap, lib=LIBRARY)


# ---- derivatives of the ops ------------------------------------------------------------------------------------------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    operands, ctx.config = _split(inputs)
    ctx.backend = _dispatch.requested()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output)


def _forward_derivative(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[Operands._fields.index("bias")]
    with _dispatch.requesting(ctx.backend):
        dq, dk, dv, dbias, _ = torch.ops.pyattn.attention_backward(
            torch.zeros_like(out) if do is None else do, dlse, out, lse, *tensors, *ctx.config, bias_grad
        )
    return dq, dk, dv, dbias if bias_grad else None, *[None] * (_N_TENSORS - 4 + len(ctx.config))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, ctx.config = _split(inputs[4:-1])
    ctx.bias_grad = inputs[-1]
    ctx.save_for_backward(*inputs[:2], *operands)


def _backward_derivative(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    do, dlse, *tensors = ctx.saved_tensors
    do, dlse, dq, dk, dv, dbias = backward_vjp(
        cotangents[: 3 + ctx.bias_grad], do, dlse, Operands(*tensors), ctx.config
    )
    # out and lse get none: the composite recomputes them, so their share is in the gradients of q, k, v and bias.
    return do, dlse, None, None, dq, dk, dv, dbias, *[None] * (_N_TENSORS - 4 + len(ctx.config) + 1)


torch.library.register_autograd(
    "pyattn::attention_forward", _forward_derivative, setup_context=_forward_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "pyattn::attention_backward", _backward_derivative, setup_context=_backward_setup, lib=LIBRARY
)
