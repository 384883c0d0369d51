"""One cross-entropy in the terms of the dispatcher op, and what runs it.

The fields of the two tuples stand in the order of the op's schema; csrc/bind_cross_entropy-inl.h reads them by
position.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import _C, reference
from ._checks import accumulation_dtype, check_class_indices, check_cross_entropy
from ._dispatch import (
    CPU,
    REFERENCE,
    TRITON,
    Backend,
    Op,
    TorchFunction,
    cpu_refusals,
    triton_refusals,
    under_transforms,
)


class CrossEntropyOperands(NamedTuple):
    """The op's tensor arguments, in the order of its schema."""

    input: Tensor  # [classes] or [batch, classes, *positions]
    target: Tensor  # indices, without the class axis; or probabilities, of input's shape
    weight: Tensor | None  # [classes]


class CrossEntropyConfig(NamedTuple):
    """The op's scalar arguments, in the order of its schema."""

    reduction: str
    ignore_index: int
    label_smoothing: float


def check(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> None:
    check_cross_entropy(*operands, *config)


def rows_shape(input: Tensor) -> torch.Size:
    """Of what is left without the class axis."""
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()


def empty_loss(input: Tensor, reduction: str) -> Tensor:
    return input.new_empty(rows_shape(input) if reduction == "none" else ())


def empty_state(input: Tensor) -> Tensor:
    """m or l: a number per row."""
    return input.new_empty(rows_shape(input), dtype=accumulation_dtype(input.dtype))


class CrossEntropyKernels(Protocol):
    """`_dispatch.Kernels` of cross-entropy."""

    backend: Backend
    memory: str

    def refusals(self, operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]: ...

    def forward(
        self, operands: CrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """loss, and, if asked for, m and l: see reference.py. Inference has no use for them."""
        ...

    def backward(
        self, dloss: Tensor, m: Tensor, l: Tensor, operands: CrossEntropyOperands, config: CrossEntropyConfig
    ) -> Tensor:
        """The gradient for input, like it in memory."""
        ...


class CpuCrossEntropy:
    """The C++ kernels of csrc/."""

    backend = CPU
    memory = "O(rows)"

    def refusals(self, operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]:
        return (*cpu_refusals("input", operands.input), *_only_torch(operands))

    def forward(
        self, operands: CrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        input = operands.input
        loss, m, l = empty_loss(input, config.reduction), None, None
        if with_state:
            rows = input.movedim(1, -1) if input.dim() > 2 else input
            m, l = _C.empty_rows(rows), _C.empty_rows(rows)
        bad_row = _C.cross_entropy_forward(operands, config, loss, m, l, torch.get_num_threads())
        if bad_row >= 0:
            _refuse_indices(operands, config)
        return loss, m, l

    def backward(
        self, dloss: Tensor, m: Tensor, l: Tensor, operands: CrossEntropyOperands, config: CrossEntropyConfig
    ) -> Tensor:
        dinput = torch.empty_like(operands.input)
        bad_row = _C.cross_entropy_backward(dloss, m, l, operands, config, dinput, torch.get_num_threads())
        if bad_row >= 0:
            _refuse_indices(operands, config)
        return dinput


class TritonCrossEntropy:
    """The Triton kernels of kernels/, imported on first use."""

    backend = TRITON
    memory = "O(rows)"

    def refusals(self, operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]:
        return (*triton_refusals("input", operands.input), *_only_torch(operands))

    def forward(
        self, operands: CrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from .kernels import cross_entropy as kernels

        input = operands.input
        loss, m, l = empty_loss(input, config.reduction), empty_state(input), empty_state(input)
        kernels.cross_entropy_forward(*operands, loss, m, l, **config._asdict())
        return loss, m, l

    def backward(
        self, dloss: Tensor, m: Tensor, l: Tensor, operands: CrossEntropyOperands, config: CrossEntropyConfig
    ) -> Tensor:
        from .kernels import cross_entropy as kernels

        dinput = torch.empty_like(operands.input)
        kernels.cross_entropy_backward(dloss, m, l, *operands, dinput, **config._asdict())
        return dinput


class ReferenceCrossEntropy:
    """The definition itself."""

    backend = REFERENCE
    memory = "O(rows * classes)"

    def refusals(self, operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Sequence[str]:
        return ()

    def forward(
        self, operands: CrossEntropyOperands, config: CrossEntropyConfig, with_state: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        check_class_indices(operands.target, _classes(operands.input), config.ignore_index)
        return reference.cross_entropy_forward(*operands, **config._asdict())

    def backward(
        self, dloss: Tensor, m: Tensor, l: Tensor, operands: CrossEntropyOperands, config: CrossEntropyConfig
    ) -> Tensor:
        gradient = reference.cross_entropy_backward(dloss, *operands, **config._asdict())
        return torch.empty_like(operands.input).copy_(gradient)


# torch.nn.functional's without the Python around it. (Its stub is wrong about the reduction.)
call_torch: Callable[[Tensor, Tensor, Tensor | None, int, int, float], Tensor]
call_torch = torch._C._nn.cross_entropy_loss  # type: ignore[assignment]
REDUCTION_ENUM = {"none": 0, "mean": 1, "sum": 2}


def torch_cross_entropy(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> Tensor:
    """torch's own function; errors are pyattn's, where pyattn has one."""
    reduction, ignore_index, label_smoothing = config
    try:
        return call_torch(*operands, REDUCTION_ENUM[reduction], ignore_index, label_smoothing)
    except (LookupError, RuntimeError, ValueError):
        check(operands, config)
        check_class_indices(operands.target, _classes(operands.input), ignore_index)
        raise


# Up to this many logits torch's call is the faster one, by the cost of a Python autograd function; see the benchmark.
TORCH_LOGITS = 49152


def _torch_preferred(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> str | None:
    logits = operands.input.numel()
    if logits <= TORCH_LOGITS:
        return f"{logits} logits: up to {TORCH_LOGITS}, the call is the cost, and torch's is the cheaper one"
    reasons = _only_torch(operands)
    return "; ".join(reasons) if reasons else None


def _only_torch(operands: CrossEntropyOperands) -> list[str]:
    """What torch's function does and no kernel."""
    input, target, weight = operands
    reasons = []
    if target.requires_grad or (weight is not None and weight.requires_grad):
        reasons.append("the target's or the weight's gradient is asked for, and kernels compute only input's")
    if any(x is not None and x.is_floating_point() and x.dtype != input.dtype for x in (target, weight)):
        reasons.append("target or weight is of another dtype than input, and kernels take one")
    if under_transforms():
        reasons.append("kernels are not differentiable by torch.func or forward-mode AD")
    return reasons


def _refuse_indices(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> None:
    check_class_indices(operands.target, _classes(operands.input), config.ignore_index)


def _classes(input: Tensor) -> int:
    return input.shape[min(input.dim() - 1, 1)]


def forward_with_state(operands: CrossEntropyOperands, config: CrossEntropyConfig) -> tuple[Tensor, Tensor, Tensor]:
    loss, m, l = CROSS_ENTROPY.choose(operands, config).forward(operands, config, with_state=True)
    assert m is not None and l is not None
    return loss, m, l


CROSS_ENTROPY: Op[CrossEntropyKernels] = Op(
    "cross_entropy",
    (CpuCrossEntropy(), TritonCrossEntropy(), ReferenceCrossEntropy()),
    TorchFunction("O(rows * classes)", _torch_preferred),
)
