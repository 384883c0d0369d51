"""One call of linear layer and cross-entropy in one with its backward, as loss_problems.py has cross-entropy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import loss_problems
import torch
import torch.nn.functional as F
from loss_problems import LossProblem
from torch import Tensor

import pyattn
from pyattn import reference
from pyattn._checks import accumulation_dtype


class Results(NamedTuple):
    loss: Tensor
    dinput: Tensor
    dlinear_weight: Tensor
    dlinear_bias: Tensor | None


@dataclass(frozen=True, repr=False)
class LinearLossProblem(LossProblem):
    """`input` holds features."""

    linear_weight: Tensor = torch.empty(0)
    linear_bias: Tensor | None = None

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order of the op's schema."""
        input, target, weight = self.in_dtype(dtype)
        bias = None if self.linear_bias is None else self.linear_bias.detach().to(dtype)
        return input, self.linear_weight.detach().to(dtype), target, bias, weight


def make(
    shape: Sequence[int] = (67, 29, 131),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 1.0,
    biased: bool = False,
    **options: Any,
) -> LinearLossProblem:
    """(rows, features, classes), or (features, classes) for a single sample. Logits have a deviation of about
    `sharpness`; the other options are those of loss_problems.make."""
    *rows, features, classes = shape
    logits = loss_problems.make((*rows, classes), dtype=dtype, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    scale = sharpness / math.sqrt(max(features, 1))
    return LinearLossProblem(
        **vars(logits)
        | {
            "input": torch.randn((*rows, features), generator=generator).to(dtype),
            "linear_weight": (torch.randn((classes, features), generator=generator) * scale).to(dtype),
            "linear_bias": torch.randn(classes, generator=generator).to(dtype) if biased else None,
        }
    )


def run(problem: LinearLossProblem, backend: str = "cpu") -> Results:
    with pyattn.use_backend(backend):
        return _differentiate(pyattn.linear_cross_entropy, problem, problem.input.dtype)


def truth(problem: LinearLossProblem) -> Results:
    """The definition, in float64."""
    operands = problem.operands(torch.float64)
    loss, _, _ = reference.linear_cross_entropy_forward(*operands, **problem.options)
    gradients = reference.linear_cross_entropy_backward(problem.dloss.double(), *operands, **problem.options)
    return _without_bias(Results(loss, *gradients), problem)


def yardstick(problem: LinearLossProblem) -> Results:
    """torch's two functions in the problem's dtype; where float16 overflows, in float32 and rounded."""
    dtype = problem.input.dtype
    results = _differentiate(composition, problem, dtype)
    if dtype == torch.float16 and not all(x.isfinite().all() for x in results if x is not None):
        wide = _differentiate(composition, problem, torch.float32)
        results = Results(*(None if x is None else x.to(dtype) for x in wide))
    return results


def magnitude(problem: LinearLossProblem) -> Results:
    """As for cross-entropy: the same sums with every term made positive. A logit is a sum too, and what rounding does
    to it is an absolute error of the loss and a relative one of the probabilities."""
    x, w, _, bias, _ = problem.operands(torch.float64)
    x, w = x.nan_to_num(0.0), w.nan_to_num(0.0)
    bias = torch.zeros(w.shape[0]).double() if bias is None else bias
    logits, sizes = x @ w.mT + bias, x.abs() @ w.abs().mT + bias.abs()
    score_eps = torch.finfo(accumulation_dtype(problem.input.dtype)).eps / torch.finfo(problem.input.dtype).eps
    disturbed = 1.0 + 2.0 * score_eps * (sizes.max().item() if sizes.numel() else 0.0)
    fields = {name: getattr(problem, name) for name in LossProblem.__dataclass_fields__}
    loss, g = loss_problems.magnitude(LossProblem(**fields | {"input": logits.to(problem.input.dtype)}))
    g = torch.atleast_2d(g * disturbed)
    dinput = (g @ w.abs()).reshape(x.shape)
    gradients = (dinput, g.mT @ torch.atleast_2d(x.abs()), g.sum(dim=0))
    return _without_bias(Results(loss * disturbed, *gradients), problem)


def composition(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """torch's linear and cross_entropy: torch.nn.functional.linear_cross_entropy, which came with 2.13."""
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, **options)


def _differentiate(function: Any, problem: LinearLossProblem, dtype: torch.dtype) -> Results:
    input, linear_weight, target, bias, weight = problem.operands(dtype)
    leaves = [x.requires_grad_() for x in (input, linear_weight, bias) if x is not None]
    loss = function(input, linear_weight, target, linear_bias=bias, weight=weight, **problem.options)
    gradients = torch.autograd.grad(loss, leaves, problem.dloss.to(dtype))
    return Results(loss.detach(), *gradients, *[None] * (3 - len(gradients)))


def _without_bias(results: Results, problem: LinearLossProblem) -> Results:
    return results if problem.linear_bias is not None else results._replace(dlinear_bias=None)


def with_garbage(problem: LinearLossProblem, garbage: float) -> LinearLossProblem:
    """`garbage` in every row that is ignored."""
    ignored = (problem.target == problem.ignore_index).unsqueeze(-1)
    return replace(problem, input=torch.where(ignored, garbage, problem.input))
