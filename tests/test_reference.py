"""The definition, against cases worked out by hand, against PyTorch, and its backward against autograd."""

import math
from dataclasses import replace

import accuracy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from problems import Problem, Results
from strategies import GARBAGE, problems
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyattn import reference


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(math.prod(shape)))


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_two_keys_by_hand() -> None:
    """Scores 0 and log 3 give the weights 1/4 and 3/4."""
    q, k = torch.tensor([[[2.0]]]).double(), torch.tensor([[[0.0], [math.log(3.0)]]]).double()
    v = torch.tensor([[[8.0, 0.0], [0.0, 4.0]]]).double()
    out, lse = reference.attention_forward(q, k, v, scale=0.5)
    torch.testing.assert_close(out, torch.tensor([[[2.0, 3.0]]]).double())
    torch.testing.assert_close(lse, torch.tensor([[math.log(4.0)]]).double())

    # dP = (8, 4), delta = 8/4 + 3 * 4/4 = 5, dS = (1/4 * 3, 3/4 * -1); the lse adds its weights, (1/4, 3/4).
    do, bias = torch.ones(1, 1, 2).double(), torch.zeros(2).double()
    dq, dk, dv, dbias = reference.attention_backward(do, None, q, k, v, bias, scale=0.5)
    torch.testing.assert_close(dbias, torch.tensor([0.75, -0.75]).double())
    torch.testing.assert_close(dq, torch.tensor([[[0.5 * -0.75 * math.log(3.0)]]]).double())
    torch.testing.assert_close(dk, torch.tensor([[[0.75], [-0.75]]]).double())
    torch.testing.assert_close(dv, torch.tensor([[[0.25, 0.25], [0.75, 0.75]]]).double())
    *_, dbias = reference.attention_backward(do, torch.ones(1, 1).double(), q, k, v, bias, scale=0.5)
    torch.testing.assert_close(dbias, torch.tensor([1.0, 0.0]).double())


@pytest.mark.parametrize(
    ("diagonal", "prefix", "expected"),
    [
        (0, 0, ["10000", "11000", "11100"]),  # upper left
        (2, 0, ["11100", "11110", "11111"]),  # lower right, as 5 - 3 = 2
        (-2, 0, ["00000", "00000", "10000"]),  # lower right with more queries than keys leaves rows empty
        (0, 2, ["11000", "11000", "11100"]),
        (0, 9, ["11111", "11111", "11111"]),
    ],
)
def test_causal_by_hand(diagonal: int, prefix: int, expected: list[str]) -> None:
    attend = reference.attended(torch.zeros(3, 5), None, None, True, diagonal, prefix)
    assert ["".join("01"[int(x)] for x in row) for row in attend] == expected


def test_masks_join_and_minus_infinity_masks() -> None:
    bias = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    mask = torch.tensor([[True, False, True, True], [True, True, True, True]])
    attend = reference.attended(torch.zeros(2, 4), bias, mask, True, 1, 0)
    assert attend.tolist() == [[True, False, False, False], [True, True, False, False]]


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # The known answers of Random123, the authors' implementation.
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    seed = torch.tensor((high << 32 | low) - (high >> 31 << 64))  # as a signed 64-bit number
    got = reference.philox(tuple(torch.tensor(int(word, 16)) for word in counter.split()), seed)
    assert " ".join(f"{int(word):08x}" for word in got) == words


def test_dropout_mask_reads_the_words_in_order() -> None:
    """Key 5 of query 3, head 2, sample 1 is word 1 of counter (1, 3, 2, 1)."""
    seed = torch.tensor(-(2**40) + 17)
    mask = reference.dropout_mask(seed, 0.4, 2, 3, 4, 6)
    for batch, head, query, key in [(0, 0, 0, 0), (1, 2, 3, 5), (1, 0, 2, 4), (0, 1, 3, 3)]:
        word = reference.philox(tuple(torch.tensor(c) for c in (key // 4, query, head, batch)), seed)[key % 4]
        assert mask[batch, head, query, key] == (word >= int(0.4 * 2**32))


def test_dropout_mask_depends_on_position_alone() -> None:
    large = reference.dropout_mask(torch.tensor(5), 0.3, 3, 4, 7, 13)
    assert torch.equal(reference.dropout_mask(torch.tensor(5), 0.3, 2, 3, 5, 11), large[:2, :3, :5, :11])


def test_dropout_probability() -> None:
    """0 keeps all, 1 drops all, and between them the share is p up to five standard deviations."""
    shape = (2, 3, 50, 101)
    assert reference.dropout_mask(torch.tensor(1), 0.0, *shape).all()
    assert not reference.dropout_mask(torch.tensor(1), 1.0, *shape).any()
    for p in (0.1, 0.5, 0.9):
        kept = reference.dropout_mask(torch.tensor(1), p, *shape).double().mean().item()
        assert abs(kept - (1.0 - p)) < 5.0 * math.sqrt(p * (1.0 - p) / math.prod(shape))


def test_dropout_uses_all_of_the_seed() -> None:
    masks = [reference.dropout_mask(torch.tensor(seed), 0.5, 1, 1, 8, 64) for seed in (0, 1, 1 << 32, -1)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


# ---- against PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "scale", "causal", "bool mask", "float mask", "grouped heads"])
def test_forward_is_torchs(options: str) -> None:
    q, k, v = randn(2, 6, 5, 3), randn(2, 6, 7, 3), randn(2, 6, 7, 4)
    ours, theirs = {"scale": 3**-0.5}, {}
    if options == "scale":
        ours = theirs = {"scale": -0.7}
    elif options == "causal":
        ours, theirs = ours | {"causal": True}, {"is_causal": True}
    elif options == "bool mask":
        mask = randn(2, 1, 5, 7) > 0
        ours, theirs = ours | {"mask": mask}, {"attn_mask": mask}
    elif options == "float mask":
        bias = randn(6, 1, 7)
        ours, theirs = ours | {"bias": bias}, {"attn_mask": bias}
    elif options == "grouped heads":
        k, v = k[:, :2], v[:, :2]
        theirs = {"enable_gqa": True}
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, **theirs)
    torch.testing.assert_close(reference.attention_forward(q, k, v, **ours)[0], expected)


@given(problems(torch.float64))
def test_backward_is_autograds(problem: Problem) -> None:
    """The explicit formulas, which `accuracy` takes for the truth, are the derivative of the forward."""
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    bias = None if problem.bias is None else problem.bias.detach().requires_grad_()
    out, lse = reference.attention_forward(*leaves, bias, problem.mask, problem.seed_tensor, **problem.kernel_arguments)
    dlse = torch.zeros_like(lse) if problem.dlse is None else problem.dlse
    # The definition leaves garbage in masked rows out; autograd multiplies it by 0.
    do = torch.where(problem.do.isfinite(), problem.do, 0.0)
    inputs = [*leaves, *([] if bias is None else [bias])]
    dq, dk, dv, *dbias = torch.autograd.grad((out, lse), inputs, (do, dlse))
    results = Results(out.detach(), lse.detach(), dq, dk, dv, dbias[0] if dbias else None)
    accuracy.check(results, problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, do = (randn(2, 5, 3, dtype=torch.float32).to(dtype) for _ in range(4))
    wide = [x.float() for x in (q, k, v)]
    out, lse = reference.attention_forward(q, k, v, scale=0.5)
    out_wide, lse_wide = reference.attention_forward(*wide, scale=0.5)
    assert lse.dtype == torch.float32 and torch.equal(lse, lse_wide)
    assert out.dtype == dtype and torch.equal(out, out_wide.to(dtype))
    grads = reference.attention_backward(do, None, q, k, v, scale=0.5)[:3]
    grads_wide = reference.attention_backward(do.float(), None, *wide, scale=0.5)[:3]
    assert all(torch.equal(x, x_wide.to(dtype)) for x, x_wide in zip(grads, grads_wide, strict=True))


# ---- masked positions do not exist -----------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
def test_garbage_stays_with_those_who_attend(where: str, garbage: float) -> None:
    """Query i sees keys 0 to i + 1. Garbage at key 3 or query 2 touches exactly what is tied to it."""
    clean = Problem(q=randn(1, 5, 3), k=randn(1, 6, 3), v=randn(1, 6, 2), do=randn(1, 5, 2))
    dirty = replace(clean, **{where: getattr(clean, where).clone()})
    getattr(dirty, where)[0, 2 if where in ("q", "do") else 3, 1] = garbage
    attend = reference.attended(torch.zeros(5, 6), None, None, True, 1, 0)
    queries = attend[:, 3] if where in ("k", "v") else torch.arange(5) == 2
    keys = (attend & queries.unsqueeze(-1)).any(dim=0)

    def results(p: Problem) -> tuple[Tensor, ...]:
        options = {"scale": 1.0, "causal": True, "diagonal": 1}
        dq, dk, dv, _ = reference.attention_backward(p.do, None, p.q, p.k, p.v, **options)
        return reference.attention_forward(p.q, p.k, p.v, **options)[0], dq, dk, dv

    touched = [queries if where != "do" else torch.zeros(5, dtype=torch.bool), queries, keys, keys]
    for x, x_clean, rows in zip(results(dirty), results(clean), touched, strict=True):
        assert torch.equal(x[0, ~rows], x_clean[0, ~rows])
        assert x[0, rows].isnan().all()


def test_nothing_to_attend_to() -> None:
    q, k, v, do = (randn(1, 3, 2) for _ in range(4))
    for mask, kv in ((torch.zeros((), dtype=torch.bool), slice(None)), (None, slice(0))):
        operands = (q, k[:, kv], v[:, kv], None, mask)
        out, lse = reference.attention_forward(*operands, scale=1.0)
        assert torch.equal(out, torch.zeros_like(q)) and (lse == -torch.inf).all()
        gradients = reference.attention_backward(do, torch.ones_like(lse), *operands, scale=1.0)
        assert all((x == 0).all() for x in gradients[:3])
