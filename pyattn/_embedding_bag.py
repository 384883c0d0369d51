"""One embedding bag in the terms of the dispatcher op, and what runs it.

The fields of the two tuples stand in the order of the op's schema; csrc/bind_embedding_bag-inl.h reads them by
position.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from . import _C, reference
from ._checks import check_bags, check_embedding_bag
from ._dispatch import (
    CPU,
    REFERENCE,
    Backend,
    Op,
    cpu_refusals,
    under_transforms,
)


class EmbeddingBagOperands(NamedTuple):
    """The op's tensor arguments, in the order of its schema."""

    weight: Tensor  # [vocabulary, features]
    input: Tensor  # [bags, tokens], or [tokens] with offsets
    offsets: Tensor | None = None  # [bags], or [bags + 1] with the end of the last
    per_sample_weights: Tensor | None = None  # of input's shape, as is the mask
    mask: Tensor | None = None  # bool, True = the token counts
    lengths: Tensor | None = None  # [bags]
    seed: Tensor | None = None  # 0-d int64, there iff dropout_p > 0


class EmbeddingBagConfig(NamedTuple):
    """The op's scalar arguments, in the order of its schema."""

    mode: str
    padding_idx: int | None
    include_last_offset: bool
    scale_grad_by_freq: bool
    dropout_p: float


def check(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> None:
    check_embedding_bag(*operands[:-1], *config)


def bags_of(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> int:
    if operands.offsets is None:
        return operands.input.shape[0]
    return operands.offsets.shape[0] - int(config.include_last_offset)


def empty_out(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Tensor:
    return operands.weight.new_empty(bags_of(operands, config), operands.weight.shape[1])


def empty_largest(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Tensor:
    """The ids of the maxima, or, in another mode, nothing."""
    shape = (bags_of(operands, config), operands.weight.shape[1]) if config.mode == "max" else (0,)
    return operands.weight.new_empty(shape, dtype=torch.int32)


def empty_dweight(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


class EmbeddingBagKernels(Protocol):
    """`_dispatch.Kernels` of the embedding bag."""

    backend: Backend
    memory: str

    def refusals(self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Sequence[str]: ...

    def forward(
        self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig, with_largest: bool
    ) -> tuple[Tensor, Tensor | None]:
        """out, and, in mode "max" and if asked for, whose the maxima are: see reference.py."""
        ...

    def backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        """The gradient for weight, like it in memory."""
        ...

    def sparse_backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        """The same as a coalesced sparse tensor: the rows that a token names."""
        ...

    def weights_backward(self, dout: Tensor, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Tensor:
        """The gradient for per_sample_weights, contiguous."""
        ...


class CpuEmbeddingBag:
    """The C++ kernels of csrc/."""

    backend = CPU
    memory = "O(tokens)"

    def refusals(self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Sequence[str]:
        return (*cpu_refusals("weight", operands.weight), *_transform_refusals())

    def forward(
        self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig, with_largest: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight = operands.weight
        out = _C.empty_matrix(weight, bags_of(operands, config), weight.shape[1])
        largest = empty_largest(operands, config) if with_largest and config.mode == "max" else None
        if _C.embedding_bag_forward(operands, config, out, largest, torch.get_num_threads()) >= 0:
            _refuse_bags(operands, config)
        return out, largest

    def backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        terms = _terms(operands, config)
        dweight = empty_dweight(operands.weight)
        _C.embedding_bag_backward(terms, dout, largest, operands, config, dweight, None, torch.get_num_threads())
        return dweight

    def sparse_backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        terms = _terms(operands, config)
        weight = operands.weight
        values = _C.empty_matrix(weight, terms.rows, weight.shape[1])
        indices = torch.empty((1, terms.rows), dtype=torch.int64)
        _C.embedding_bag_backward(terms, dout, largest, operands, config, values, indices[0], torch.get_num_threads())
        return torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=False, is_coalesced=True)

    def weights_backward(self, dout: Tensor, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Tensor:
        assert operands.per_sample_weights is not None
        dw = torch.zeros_like(operands.per_sample_weights, memory_format=torch.contiguous_format)
        if _C.embedding_bag_weights_backward(dout, operands, config, dw, torch.get_num_threads()) >= 0:
            _refuse_bags(operands, config)
        return dw


class ReferenceEmbeddingBag:
    """The definition itself."""

    backend = REFERENCE
    memory = "O(tokens * features)"

    def refusals(self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Sequence[str]:
        return ()

    def forward(
        self, operands: EmbeddingBagOperands, config: EmbeddingBagConfig, with_largest: bool
    ) -> tuple[Tensor, Tensor | None]:
        check_bags(*operands[:3], operands.mask, operands.lengths, config.padding_idx, config.include_last_offset)
        return reference.embedding_bag_forward(*operands, **config._asdict())

    def backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        assert largest is not None
        dweight, _ = reference.embedding_bag_backward(dout, largest, *operands, **config._asdict())
        return empty_dweight(operands.weight).copy_(dweight)

    def sparse_backward(
        self, dout: Tensor, largest: Tensor | None, operands: EmbeddingBagOperands, config: EmbeddingBagConfig
    ) -> Tensor:
        return self.backward(dout, largest, operands, config).to_sparse(1)

    def weights_backward(self, dout: Tensor, operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> Tensor:
        largest = empty_largest(operands, config)
        _, dw = reference.embedding_bag_backward(dout, largest, *operands, **config._asdict())
        assert dw is not None
        return dw.contiguous()


# torch.func's transforms and forward-mode AD need an op's rules; the definition is made of ops that have them.
_NOT_DIFFERENTIABLE = (
    "kernels are not differentiable by torch.func or forward-mode AD; use_backend('reference') computes by the "
    "definition, which is",
)


def _transform_refusals() -> Sequence[str]:
    return _NOT_DIFFERENTIABLE if under_transforms() else ()


def _terms(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> _C.BagTerms:
    terms = _C.BagTerms(operands, config)
    if terms.bad_bag >= 0:
        _refuse_bags(operands, config)
    return terms


def _refuse_bags(operands: EmbeddingBagOperands, config: EmbeddingBagConfig) -> NoReturn:
    """A kernel has met an id, an offset or a length that is none; here are the words."""
    weight, input, offsets, _, mask, lengths, _ = operands
    check_bags(weight, input, offsets, mask, lengths, config.padding_idx, config.include_last_offset)
    raise AssertionError("the kernel refused bags that the check does not")


EMBEDDING_BAG: Op[EmbeddingBagKernels] = Op("embedding_bag", (CpuEmbeddingBag(), ReferenceEmbeddingBag()))
