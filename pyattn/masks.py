"""Masks as numbers, not as q_len x kv_len tensors.

A mask object says which keys a query may attend to; `&` joins masks, also with a bool tensor (True = attend) on either
side. Before any kernel runs, `lower` turns the whole into the few scalars of the op's schema and at most one tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._checks import DtypeError

Align = Literal["upper_left", "lower_right"]

_AND = (operator.and_, Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and, torch.bitwise_and)

# The op's `align`: how query i sits over the keys when q_len != kv_len.
NO_ALIGN, UPPER_LEFT, LOWER_RIGHT = 0, 1, 2


class Mask:
    """What `attention(mask=...)` takes besides a bool tensor."""

    __array_ufunc__ = None  # else NumPy would apply & to this and each element of an array, before it fails

    def __and__(self, other: Mask | Tensor) -> Mask:
        if not isinstance(other, Mask | Tensor):
            return NotImplemented
        return _Both(self, other)

    __rand__ = __and__  # joining is symmetric

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Under torch.compile, `&` with a tensor arrives here and not at the operators above."""
        return _Both(*args) if func in _AND else NotImplemented


@dataclass(frozen=True)
class Causal(Mask):
    """Query i attends to key j iff ``j <= i + offset`` or ``j < prefix``.

    Args:
        align: where the diagonal starts when q_len != kv_len, and then required. ``"upper_left"``: offset 0, as
            torch's ``is_causal=True``. ``"lower_right"``: offset kv_len - q_len, as FlashAttention 2.1 and decoding
            with a cache: the last query sees every key.
        prefix: keys below it are visible to every query (prefix LM).

    With 2 queries and 4 keys::

        upper_left    1 0 0 0      lower_right   1 1 1 0
                      1 1 0 0                    1 1 1 1
    """

    align: Align | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.align is not None and self.align not in get_args(Align):
            raise ValueError(f"Causal: align must be 'upper_left', 'lower_right' or None, got {self.align!r}")
        if not isinstance(self.prefix, Integral) or not 0 <= self.prefix < 2**63:
            raise ValueError(f"Causal: prefix must be a number of keys, 0 or more, got {self.prefix!r}")
        if not isinstance(self.prefix, int):  # one of NumPy's
            object.__setattr__(self, "prefix", int(self.prefix))


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class _Both(Mask):
    first: Mask | Tensor
    second: Mask | Tensor


class LoweredMask(NamedTuple):
    """A mask in the terms of the op's schema."""

    tensor: Tensor | None = None
    align: int = NO_ALIGN
    left: int | None = None
    right: int | None = None
    prefix: int = 0


def check_causal(align: int, right: int | None, prefix: int) -> None:
    """What `lower` never makes, but a call of the dispatcher op may."""
    if align not in (NO_ALIGN, UPPER_LEFT, LOWER_RIGHT):
        raise ValueError(f"align: expected 0 (not causal), 1 (upper left) or 2 (lower right), got {align}")
    if (right is None) != (align == NO_ALIGN):
        raise ValueError(
            f"align, right: a causal mask has right=0 and an align, others have neither, got {align}, {right}"
        )
    if prefix < 0 or (prefix > 0 and right is None):
        raise ValueError(f"prefix: expected a number of keys of a causal mask, got {prefix} with right={right}")


def lower(mask: Mask | Tensor | None, q_len: int, kv_len: int) -> LoweredMask:
    if mask is None:
        return LoweredMask()
    if isinstance(mask, Tensor):
        return LoweredMask(tensor=mask)
    if isinstance(mask, Causal):
        if mask.align is None and q_len != kv_len:
            raise ValueError(
                f"Causal: q_len={q_len} differs from kv_len={kv_len}, so the alignment must be named: "
                "Causal(align='upper_left') is torch's is_causal=True, Causal(align='lower_right') lets the last query "
                "see every key (decoding with a cache)."
            )
        # With equal lengths both alignments are one; UPPER_LEFT keeps a compiled graph free of the lengths.
        align = LOWER_RIGHT if mask.align == "lower_right" else UPPER_LEFT
        return LoweredMask(align=align, right=0, prefix=mask.prefix)
    assert isinstance(mask, _Both)
    return _join(lower(mask.first, q_len, kv_len), lower(mask.second, q_len, kv_len), q_len, kv_len)


def _join(a: LoweredMask, b: LoweredMask, q_len: int, kv_len: int) -> LoweredMask:
    for side in (a, b):
        if side.tensor is not None and side.tensor.dtype != torch.bool:
            raise DtypeError(f"mask: only bool tensors (True = attend) can be joined by &, got {side.tensor.dtype}")
    if a.tensor is not None and b.tensor is not None:
        tensor: Tensor | None = a.tensor & b.tensor
    else:
        tensor = a.tensor if a.tensor is not None else b.tensor
    if a.align and b.align:
        if a.align != b.align and q_len != kv_len:
            raise ValueError("Causal: two causal masks of different alignment cannot be joined; use one of them")
        return LoweredMask(tensor, a.align, None, 0, min(a.prefix, b.prefix))
    causal = a if a.align else b
    return causal._replace(tensor=tensor)
