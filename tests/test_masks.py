"""Mask objects: what they let through, alone and joined, is what the bool tensor of their definition lets through."""

from collections.abc import Callable
from dataclasses import replace

import accuracy
import pytest
import torch
from problems import make, run
from torch import Tensor

from pyattn import Causal
from pyattn.masks import Mask


def causal(q_len: int, kv_len: int, offset: int = 0, prefix: int = 0) -> Tensor:
    """The docstring of `Causal`, as a tensor."""
    query, key = torch.arange(q_len).unsqueeze(-1), torch.arange(kv_len)
    return (key <= query + offset) | (key < prefix)


BAND = (torch.arange(67).unsqueeze(-1) - torch.arange(131)).abs() < 40
PADDING = (torch.arange(131) < torch.tensor([100, 60]).view(2, 1, 1, 1)) & (torch.arange(131) > 2)
UPPER, LOWER = causal(67, 131), causal(67, 131, offset=64)

MASKS: dict[str, tuple[Callable[[], Mask | Tensor], Tensor]] = {
    "upper left": (lambda: Causal("upper_left"), UPPER),
    "lower right": (lambda: Causal("lower_right"), LOWER),
    "prefix": (lambda: Causal("upper_left", prefix=70), causal(67, 131, prefix=70)),
    "prefix of all keys": (lambda: Causal("lower_right", prefix=200), torch.ones(67, 131, dtype=torch.bool)),
    "object & tensor": (lambda: Causal("upper_left") & BAND, UPPER & BAND),
    "tensor & object": (lambda: BAND & Causal("lower_right"), LOWER & BAND),
    "tensor & object & tensor": (lambda: BAND & Causal("lower_right") & PADDING, LOWER & BAND & PADDING),
    "tensor & (object & tensor)": (lambda: BAND & (Causal("lower_right") & PADDING), LOWER & BAND & PADDING),
    "two objects": (lambda: Causal("upper_left") & Causal("upper_left"), UPPER),
    "two prefixes": (
        lambda: Causal("upper_left", prefix=9) & Causal("upper_left", prefix=90),
        causal(67, 131, prefix=9),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_is_the_tensor_of_its_definition(name: str) -> None:
    mask, tensor = MASKS[name]
    problem = make()
    accuracy.check(run(replace(problem, mask=mask())), replace(problem, mask=tensor))


@pytest.mark.parametrize(
    "masks", [(Causal("upper_left"), Causal("lower_right")), (Causal(), Causal("lower_right"))], ids=str
)
def test_alignments_are_one_for_equal_lengths(masks: tuple[Causal, Causal]) -> None:
    """So they may be joined, and need not be named."""
    problem = make(q_len=67, kv_len=67)
    accuracy.check(run(replace(problem, mask=masks[0] & masks[1])), replace(problem, mask=causal(67, 67)))
    accuracy.check(run(replace(problem, causal=masks[0])), replace(problem, mask=causal(67, 67)))


def test_a_mask_is_a_value() -> None:
    assert Causal("lower_right", prefix=2) == Causal("lower_right", 2) != Causal("lower_right")
    assert len({Causal(), Causal(), Causal(prefix=1)}) == 2
    assert repr(Causal("upper_left")) == "Causal(align='upper_left', prefix=0)"
