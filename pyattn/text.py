"""From texts to token ids: a vocabulary of whitespace-separated, lower-cased words."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PAD, UNK = 0, 1
SPECIAL = {"<PAD>": PAD, "<UNK>": UNK}  # upper case: no lower-cased word collides with them


def build_vocab(texts: Iterable[str], max_vocab: int = 5000) -> dict[str, int]:
    """Number the `max_vocab` most frequent words of `texts` from 2; ``<PAD>`` is 0 and ``<UNK>`` is 1.

    Words are ``text.lower().split()``. Among equally frequent ones the word seen first comes first, so equal texts in
    equal order give an equal vocabulary.
    """
    _check_texts(texts)
    _check_positive("max_vocab", max_vocab)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.lower().split())
    return SPECIAL | {word: idx for idx, (word, _) in enumerate(counts.most_common(max_vocab), start=len(SPECIAL))}


def encode_texts(texts: Iterable[str], vocab: Mapping[str, int], max_len: int = 100) -> Tensor:
    """Ids of the first `max_len` words of each text, int64 ``[texts, max_len]``, padded with `PAD` on the right.

    Words outside `vocab` become `UNK`; a text without words is a row of `PAD`.
    """
    _check_texts(texts)
    _check_positive("max_len", max_len)
    ids: list[int] = []
    lengths: list[int] = []
    for text in texts:
        words = text.lower().split(maxsplit=max_len)[:max_len]  # never splits what is truncated anyway
        ids += [vocab.get(word, UNK) for word in words]
        lengths.append(len(words))
    encoded = torch.full((len(lengths), max_len), PAD)
    # One flat tensor, scattered into the rows at once: building a tensor from padded lists costs more than the split.
    encoded[torch.arange(max_len) < torch.tensor(lengths, dtype=torch.int64)[:, None]] = torch.tensor(
        ids, dtype=torch.int64
    )
    return encoded


def separate_punctuation(text: str) -> str:
    """`text` with each punctuation mark a word of its own, so that "socket." is read as "socket" and a dot."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def _check_texts(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"texts: expected several texts, got one string, {texts[:40]!r}; [text] makes a list of it")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
