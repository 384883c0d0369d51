"""Losses as modules."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..losses import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` on `pyattn.cross_entropy`, which says what the arguments mean.

    >>> CrossEntropyLoss(label_smoothing=0.1)(torch.randn(8, 1000), torch.randint(1000, (8,))).shape
    torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Literal["none", "mean", "sum"] = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` on `pyattn.linear_cross_entropy`, which says what the arguments mean.

    The linear layer is kept flat, as torch keeps it: ``linear.weight`` is ``[classes * positions, features]``.

    >>> LinearCrossEntropyLoss(64, 1000, bias=True)(torch.randn(8, 64), torch.randint(1000, (8,))).shape
    torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Literal["none", "mean", "sum"] = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction: Literal["none", "mean", "sum"] = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        size = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, size, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        classes, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*classes, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.view(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
