"""Losses as modules."""

from typing import Literal

from torch import Tensor, nn

from ..losses import cross_entropy


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
