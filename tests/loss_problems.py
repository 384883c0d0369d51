"""One call of cross-entropy with its backward, as a value that tests draw, run and judge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._checks import accumulation_dtype


class Results(NamedTuple):
    loss: Tensor
    dinput: Tensor


@dataclass(frozen=True, repr=False)
class LossProblem:
    """Inputs, options, and the gradient of the loss."""

    input: Tensor
    target: Tensor
    dloss: Tensor
    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                value = f"{dtype} {tuple(value.shape)}, strides {value.stride()}, offset {value.storage_offset()}"
            lines.append(f"  {field.name}: {value}")
        return "\n".join(("LossProblem(", *lines, ")"))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis would print a dataclass with all the numbers in its tensors."""
        printer.text(repr(self))

    @property
    def options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    @property
    def class_axis(self) -> int:
        return min(self.input.dim() - 1, 1)

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """input, target, weight, where they are floating."""
        tensors = (self.input.detach(), self.target, self.weight)
        return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)


def make(
    shape: Sequence[int] = (67, 131),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 1.0,
    probabilities: bool = False,
    weighted: bool = False,
    ignored: float = 0.2,
    **options: Any,
) -> LossProblem:
    """Standard normal logits, times `sharpness`; of class indices the part `ignored` is ignored."""
    generator = torch.Generator().manual_seed(seed)
    axis = min(len(shape) - 1, 1)
    classes, rows = shape[axis], (*shape[:axis], *shape[axis + 1 :])
    input = (torch.randn(tuple(shape), generator=generator) * sharpness).to(dtype)
    if probabilities:
        target = torch.randn(tuple(shape), generator=generator).softmax(axis).to(dtype)
    else:
        target = torch.randint(max(classes, 1), rows, generator=generator)
        kept = torch.rand(rows, generator=generator) >= ignored
        target = torch.where(kept & bool(classes), target, options.get("ignore_index", -100))
    weight = torch.rand(classes, generator=generator).add(0.1).to(dtype) if weighted else None
    dloss = torch.randn(rows if options.get("reduction") == "none" else (), generator=generator).to(dtype)
    return LossProblem(input, target, dloss, weight, **options)


def run(problem: LossProblem, backend: str = "cpu") -> Results:
    """What pyattn gives, on kernels whatever the size."""
    leaf = problem.input.detach().requires_grad_()
    with pyattn.use_backend(backend):
        loss = pyattn.cross_entropy(leaf, problem.target, problem.weight, **problem.options)
    return Results(loss.detach(), *torch.autograd.grad(loss, leaf, problem.dloss))


def truth(problem: LossProblem) -> Results:
    """The definition, in float64."""
    operands = problem.in_dtype(torch.float64)
    loss, _, _ = reference.cross_entropy_forward(*operands, **problem.options)
    return Results(loss, reference.cross_entropy_backward(problem.dloss.double(), *operands, **problem.options))


def yardstick(problem: LossProblem) -> Results:
    """torch's own function in the problem's dtype.

    Where its float16 sums over classes overflow, it has no answer; then it is computed in float32 and rounded.
    """
    dtype = problem.input.dtype
    results = _torchs(problem, dtype)
    if dtype == torch.float16 and not results.loss.isfinite().all():
        results = Results(*(x.to(dtype) for x in _torchs(problem, torch.float32)))
    return results


def _torchs(problem: LossProblem, dtype: torch.dtype) -> Results:
    input, target, weight = problem.in_dtype(dtype)
    leaf = input.requires_grad_()
    loss = F.cross_entropy(leaf, target, weight, **problem.options)
    return Results(loss.detach(), *torch.autograd.grad(loss, leaf, problem.dloss.to(dtype)))


def magnitude(problem: LossProblem) -> Results:
    """The same sums with every term made positive, in float64: what rounding the terms can disturb.

    Each logit reaches a row's loss by its distance to the largest, and each share q by two terms, log(l) and m - x,
    that may cancel; so may the two terms of a gradient.
    """
    input, target, weight = problem.in_dtype(torch.float64)
    none = problem.options | {"reduction": "none"}
    _, m, l = reference.cross_entropy_forward(input, target, weight, **none)
    x = input.movedim(problem.class_axis, -1)
    # A probability is an exponential: the absolute error of x - m is its relative error. Sums over the classes, of the
    # exponentials, of the shares and of the loss, lose digits with their depth.
    score_eps = torch.finfo(accumulation_dtype(problem.input.dtype)).eps / torch.finfo(problem.input.dtype).eps
    depth = score_eps * math.log(max(x.shape[-1], 1))
    below = (m.unsqueeze(-1) - x).nan_to_num(0.0, 0.0, 0.0)
    p = torch.exp(-below) / l.unsqueeze(-1) * (1.0 + score_eps * below + depth)
    classes = max(x.shape[-1], 1)
    w = torch.ones(classes).double() if weight is None else weight
    smooth = problem.label_smoothing / classes
    if target.is_floating_point():
        t = target.movedim(problem.class_axis, -1)
        q, total = w * ((1 - problem.label_smoothing) * t + smooth), float(max(m.numel(), 1))
    else:
        valid = target != problem.ignore_index
        one_hot = (target.unsqueeze(-1) == torch.arange(x.shape[-1])).double()
        q = torch.where(valid.unsqueeze(-1), w[: x.shape[-1]] * ((1 - problem.label_smoothing) * one_hot + smooth), 0.0)
        total = float((one_hot * w[: x.shape[-1]]).sum(-1)[valid].sum()) or 1.0
    distance = torch.where(q > 0, below, 0.0)
    rows = (q * (l.log().abs().unsqueeze(-1) + distance + 1.0)).sum(-1) * (1.0 + depth)
    dloss = problem.dloss.double().abs() / (total if problem.reduction == "mean" else 1.0)
    # A share is a product of four numbers and a sum, so it is rounded as often again as a term that is one product.
    gradient = dloss.unsqueeze(-1) * (q.sum(-1, keepdim=True) * p + 2.0 * q)
    loss = rows if problem.reduction == "none" else rows.sum() / (total if problem.reduction == "mean" else 1.0)
    return Results(loss, gradient.movedim(-1, problem.class_axis))
