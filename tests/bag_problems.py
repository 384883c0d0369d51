"""One call of the embedding bag with its backward, as a value that tests draw, run and judge."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._embedding_bag import EmbeddingBagOperands


class Results(NamedTuple):
    out: Tensor
    dweight: Tensor
    dw: Tensor | None  # of the per-sample weights


@dataclass(frozen=True, repr=False)
class BagProblem:
    """Inputs, options, and the gradient of the output."""

    weight: Tensor
    input: Tensor
    dout: Tensor
    offsets: Tensor | None = None
    per_sample_weights: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    mode: str = "mean"
    padding_idx: int | None = None
    include_last_offset: bool = False
    scale_grad_by_freq: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                small = f" {value.tolist()}" if not value.is_floating_point() and value.numel() < 50 else ""
                value = f"{dtype} {tuple(value.shape)}, strides {value.stride()}{small}"
            lines.append(f"  {field.name}: {value}")
        return "\n".join(("BagProblem(", *lines, ")"))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print a dataclass with all the numbers in its tensors."""
        printer.text(repr(self))

    @property
    def options(self) -> dict[str, Any]:
        names = ("mode", "padding_idx", "include_last_offset", "scale_grad_by_freq", "dropout_p")
        return {name: getattr(self, name) for name in names}

    def operands(self) -> EmbeddingBagOperands:
        seed = torch.tensor(self.seed) if self.dropout_p else None
        weights = self.per_sample_weights
        return EmbeddingBagOperands(self.weight, self.input, self.offsets, weights, self.mask, self.lengths, seed)

    def in_dtype(self, dtype: torch.dtype) -> "BagProblem":
        changes = {name: getattr(self, name) for name in ("weight", "dout", "per_sample_weights")}
        return replace(self, **{name: None if x is None else x.detach().to(dtype) for name, x in changes.items()})


def make(
    bags: int = 17,
    tokens: int = 23,
    vocabulary: int = 41,
    features: int = 67,
    *,
    dtype: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
    seed: int = 0,
    form: Sequence[str] = (),
    **options: Any,
) -> BagProblem:
    """Standard normal tables and gradients, ids at random. `form`: "offsets", "last offset", "weighted", "mask" and
    "lengths" as wanted."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ragged = "offsets" in form or "last offset" in form
    shape = (bags * tokens,) if ragged else (bags, tokens)
    input = torch.randint(max(vocabulary, 1), shape, generator=generator).to(ids)
    offsets = lengths = mask = None
    if ragged:
        inner = torch.randint(bags * tokens + 1, (max(bags - 1, 0),), generator=generator).sort().values
        starts = torch.cat([torch.zeros(min(bags, 1), dtype=torch.int64), inner])
        end = torch.tensor([max(bags * tokens - 3, int(starts[-1]) if bags else 0)])
        offsets = torch.cat([starts, end]) if "last offset" in form else starts
        offsets = offsets.to(ids)
    if "lengths" in form:
        lengths = torch.randint(tokens + 1, (bags,), generator=generator).to(ids)
    if "mask" in form:
        mask = torch.rand(shape, generator=generator) < 0.7
    # Positive: a mean divides by their sum, and where that almost cancels no dtype has an answer.
    weights = (torch.rand(shape, generator=generator) + 0.1).to(dtype) if "weighted" in form else None
    return BagProblem(
        normal(vocabulary, features), input, normal(bags, features), offsets, weights, mask, lengths,
        include_last_offset="last offset" in form, seed=seed, **options,
    )  # fmt: skip


def run(problem: BagProblem, backend: str = "cpu", sparse: bool = False) -> Results:
    """What pyattn gives."""
    weight, weights = problem.weight.detach().requires_grad_(), problem.per_sample_weights
    leaves = [weight]
    if weights is not None:
        leaves.append(weights := weights.detach().requires_grad_())
    options = problem.options | ({"dropout_seed": problem.seed} if problem.dropout_p else {})
    with pyattn.use_backend(backend):
        out = pyattn.embedding_bag(
            problem.input, weight, problem.offsets, per_sample_weights=weights, mask=problem.mask,
            lengths=problem.lengths, sparse=sparse, **options,
        )  # fmt: skip
    dweight, *dw = torch.autograd.grad(out, leaves, problem.dout)
    return Results(out.detach(), dweight, dw[0] if dw else None)


def by_definition(problem: BagProblem) -> Results:
    operands = problem.operands()
    out, largest = reference.embedding_bag_forward(*operands, **problem.options)
    return Results(out, *reference.embedding_bag_backward(problem.dout, largest, *operands, **problem.options))


def truth(problem: BagProblem) -> Results:
    """The definition, in float64."""
    return by_definition(problem.in_dtype(torch.float64))


def yardstick(problem: BagProblem) -> Results:
    """The definition in the problem's dtype."""
    return by_definition(problem)


def magnitude(problem: BagProblem) -> Results:
    """The same sums with every term made positive, in float64: what rounding the terms can disturb."""
    wide = problem.in_dtype(torch.float64)
    weights = wide.per_sample_weights
    absolute = replace(
        wide,
        weight=wide.weight.nan_to_num(0.0, 0.0, 0.0).abs(),
        dout=wide.dout.nan_to_num(0.0, 0.0, 0.0).abs(),
        per_sample_weights=None if weights is None else weights.abs(),
    )
    if problem.mode != "max":
        results = by_definition(absolute)
        if problem.mode == "sum" or weights is None:
            return results
        # The gradient of a weight is the difference of two numbers, the second no larger than the first's maximum.
        summed = replace(absolute, mode="sum")
        totals = by_definition(replace(summed, weight=torch.ones_like(wide.weight))).out
        parts = by_definition(replace(summed, dout=absolute.dout / totals.where(totals > 0, 1.0))).dw
        return results._replace(dw=None if parts is None else 2.0 * parts)
    # The largest is chosen among the signed numbers.
    out, largest = reference.embedding_bag_forward(*wide.operands(), **problem.options)
    dweight, _ = reference.embedding_bag_backward(absolute.dout, largest, *wide.operands(), **problem.options)
    return Results(out.abs(), dweight, None)
