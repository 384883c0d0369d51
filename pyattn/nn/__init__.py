"""Thin modules over pyattn's functions, with torch.nn's names, constructors and state_dict keys."""

from .embedding import EmbeddingBag
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .rnn import LSTM

__all__ = ["LSTM", "CrossEntropyLoss", "EmbeddingBag", "LinearCrossEntropyLoss"]
