"""Derivatives of attention that no kernel computes, as composites of the reference: forward mode, and the derivative
of the backward. They hold whole score matrices, O(q_len * kv_len); first derivatives in reverse mode do not come here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._problem import AttentionConfig, Operands, kernel_arguments

Optionals = Sequence[Tensor | None]


def forward_jvp(tangents: Optionals, operands: Operands, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    """Tangents of (out, lse) from those of q, k, v and bias."""
    arguments = kernel_arguments(operands, config)._asdict()

    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return reference.attention_forward(q, k, v, bias, operands.mask, operands.seed, **arguments)

    primals = (operands.q, operands.k, operands.v, operands.bias)
    out, lse = _jvp(forward, primals, tangents)
    return out, lse


def backward_jvp(
    tangents: Optionals, do: Tensor, dlse: Tensor | None, operands: Operands, config: AttentionConfig
) -> tuple[Tensor, ...]:
    """Tangents of (dq, dk, dv) and, with a bias, dbias, from those of do, dlse, q, k, v and bias."""
    backward, primals = _backward_of(do, dlse, operands, config)
    return _jvp(backward, primals, tangents)


def backward_vjp(
    cotangents: Sequence[Tensor], do: Tensor, dlse: Tensor | None, operands: Operands, config: AttentionConfig
) -> list[Tensor | None]:
    """Gradients for do, dlse, q, k, v and bias from cotangents of (dq, dk, dv) or (dq, dk, dv, dbias)."""
    backward, primals = _backward_of(do, dlse, operands, config)
    on_present, present = _without_none(lambda *inputs: backward(*inputs)[: len(cotangents)], primals)
    _, pullback = _vjp(on_present, *present)
    return _with_none(pullback(tuple(cotangents)), primals)


def _backward_of(
    do: Tensor, dlse: Tensor | None, operands: Operands, config: AttentionConfig
) -> tuple[Callable[..., tuple[Tensor, ...]], Optionals]:
    arguments = kernel_arguments(operands, config)._asdict()

    def backward(
        do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        dq, dk, dv, dbias = reference.attention_backward(
            do, dlse, q, k, v, bias, operands.mask, operands.seed, **arguments
        )
        return (dq, dk, dv) if dbias is None else (dq, dk, dv, dbias)

    return backward, (do, dlse, operands.q, operands.k, operands.v, operands.bias)


def _jvp(fn: Callable[..., tuple[Tensor, ...]], primals: Optionals, tangents: Optionals) -> tuple[Tensor, ...]:
    on_present, present = _without_none(fn, primals)
    directions = tuple(
        torch.zeros_like(primal) if tangent is None else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
        if primal is not None
    )
    # Pushing forward is pulling back twice, u -> vjp(u) being linear. torch.func.jvp would be direct, but it cannot run
    # inside torch.autograd.forward_ad's levels, which do not nest.
    outputs, pullback = _vjp(on_present, *present)
    _, transposed = _vjp(pullback, tuple(torch.zeros_like(output) for output in outputs))
    (result,) = transposed(directions)
    return tuple(result)


def _vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    outputs, pullback = torch.func.vjp(fn, *primals)[:2]
    return outputs, pullback


def _without_none(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Optionals
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """`fn` as a function of the inputs that are there, and those: torch.func takes no None."""
    return (
        lambda *present: fn(*_with_none(present, inputs)),
        tuple(x for x in inputs if x is not None),
    )


def _with_none(present: Iterable[Tensor], like: Optionals) -> list[Tensor | None]:
    values = iter(present)
    return [None if x is None else next(values) for x in like]
