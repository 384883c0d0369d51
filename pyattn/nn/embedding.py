"""Embeddings as modules."""

from typing import Literal

import torch
from torch import Tensor, nn

from .._checks import check_bag_options, check_dropout_p
from ..embedding import embedding_bag

Mode = Literal["sum", "mean", "max"]


class EmbeddingBag(nn.Module):
    """`torch.nn.EmbeddingBag` on `pyattn.embedding_bag`, which says what the arguments mean.

    `dropout_p` is word dropout, in training mode only.

    >>> EmbeddingBag(1000, 64, padding_idx=0)(torch.tensor([[3, 1, 0, 0], [2, 0, 0, 0]])).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        if padding_idx is not None and padding_idx < 0:
            padding_idx += num_embeddings
        check_bag_options(num_embeddings, None, mode, padding_idx, scale_grad_by_freq)
        check_dropout_p(dropout_p)
        if max_norm is not None:
            raise NotImplementedError(f"max_norm: see pyattn.embedding_bag, got {max_norm}")
        if _weight is not None and _weight.shape != (num_embeddings, embedding_dim):
            raise ValueError(f"_weight: expected shape ({num_embeddings}, {embedding_dim}), got {tuple(_weight.shape)}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.mode: Mode = mode
        self.sparse = sparse
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx
        self.dropout_p = dropout_p
        if _weight is None:
            self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.weight = nn.Parameter(_weight)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        dropout_p: float = 0.0,
    ) -> "EmbeddingBag":
        """A module on a table that exists; `freeze` keeps it from learning."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings: expected shape (vocabulary, features), got {tuple(embeddings.shape)}")
        num_embeddings, embedding_dim = embeddings.shape
        bag = cls(
            num_embeddings,
            embedding_dim,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            _weight=embeddings,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            dropout_p=dropout_p,
        )
        bag.weight.requires_grad = not freeze
        return bag

    def reset_parameters(self) -> None:
        """Standard normal, and zeros for the padding."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        return embedding_bag(
            input,
            self.weight,
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            sparse=self.sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            mask=mask,
            lengths=lengths,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        options = {"mode": self.mode, "padding_idx": self.padding_idx, "dropout_p": self.dropout_p or None}
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        return ", ".join([str(self.num_embeddings), str(self.embedding_dim), *given])
