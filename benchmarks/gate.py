"""The correctness gate: no time is shown for a case that does not pass it.

Error is the relative Frobenius norm ||x - truth|| / ||truth|| against float64 on the same rounded inputs, per output
and gradient, pooled over several seeds. pyattn's may be at most `FACTOR` times that of torch's own kernel in the same
dtype, so speed is not bought with accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import Case, Route
from torch import Tensor

SEEDS = 8
FACTOR = 1.1

# Where the ratio of two errors says nothing, an error of a few eps passes: in float64 the truth itself is rounded, and
# over a handful of numbers (a call with one key) rounding errors do not average out.
FLOOR_EPS = 16
FEW_NUMBERS = 1024


@dataclass(frozen=True)
class Error:
    """One output or gradient: pyattn's error, torch's, and the most that passes."""

    result: str
    pyattn: float
    torch: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.pyattn <= self.limit  # False for NaN


def check(case: Case, candidate: Route, device: str, seeds: int = SEEDS) -> list[Error]:
    """One `Error` per result of the case, in its order."""
    yardstick = case.routes(device)[case.yardstick]
    # Squared norms, one column per result: the candidate's error, the yardstick's, the truth, the output's gradient.
    squares = torch.zeros(4, len(case.results), dtype=torch.float64)
    for seed in range(seeds):
        inputs, grad_out = case.inputs(seed, device)
        truth = case.truth(inputs, grad_out)
        for row, route in enumerate((candidate, yardstick)):
            results = _results(route, inputs, grad_out, trained=len(truth) > 1)
            differences = [x - t for x, t in zip(results, truth, strict=True)]
            squares[row] += _squares(differences)
        squares[2] += _squares(truth)
        squares[3] += _squares([grad_out.double()])

    # With a single key softmax is constant and dq = dk = 0: their errors are then relative to grad_out.
    norms = torch.where(squares[2] > 0, squares[2], squares[3])
    ours, theirs = (squares[:2] / norms).sqrt().tolist()
    floors = [_floor(grad_out.dtype, seeds * result.numel()) for result in truth]
    return [
        Error(result, error, yard, max(FACTOR * yard, floor))
        for result, error, yard, floor in zip(case.results, ours, theirs, floors, strict=True)
    ]


def _floor(dtype: torch.dtype, numbers: int) -> float:
    meaningless = dtype == torch.float64 or numbers < FEW_NUMBERS
    return FLOOR_EPS * torch.finfo(dtype).eps if meaningless else 0.0


def _results(route: Route, inputs: Sequence[Tensor], grad_out: Tensor, trained: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(trained) for x in inputs]
    with route.context():
        out = route.call(*leaves)
        return [out.detach(), *(torch.autograd.grad(out, leaves, grad_out) if trained else ())]


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors]).cpu()
