"""A text classifier from raw text to one file: training, evaluation, saving, loading."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._progress import progress
from .corpus import Example, Split, optional_module
from .models import TransformerClassifier
from .text import PAD, UNK, build_vocab, encode_texts, separate_punctuation

FORMAT, VERSION = "pyattn text classifier", 1


class ModelFileError(ValueError):
    """A file cannot be loaded as a model, and why."""


@dataclass(frozen=True)
class Settings:
    """What a classifier is built with, besides its vocabulary and labels.

    The defaults train on the standard library's docstrings in about a minute on one core. On their validation part,
    one block and twice the width were within the noise of these (0.01; two seeds each, November 2026).
    """

    max_vocab: int = 5000
    max_len: int = 64
    embed_dim: int = 64
    hidden_dim: int = 128
    num_heads: int = 4
    num_layers: int = 2
    dropout: float = 0.3


class Epoch(NamedTuple):
    number: int
    loss: float  # mean over the training texts, dropout included
    validation_accuracy: float
    time_s: float


class Classifier:
    """A model together with what turns texts into its input and its output into labels."""

    BATCH_SIZE = 64  # in prediction; it changes no result beyond rounding

    def __init__(self, settings: Settings, vocab: dict[str, int], labels: Sequence[str]) -> None:
        self.settings, self.vocab, self.labels = settings, vocab, list(labels)
        self.model = TransformerClassifier(
            len(vocab),
            settings.embed_dim,
            settings.hidden_dim,
            len(self.labels),
            num_heads=settings.num_heads,
            num_layers=settings.num_layers,
            max_len=settings.max_len,
            dropout=settings.dropout,
            padding_idx=PAD,
        )

    @classmethod
    def untrained(cls, train: Sequence[Example], settings: Settings) -> "Classifier":
        """With the vocabulary and the labels of the training part."""
        vocab = build_vocab([separate_punctuation(text) for text, _ in train], settings.max_vocab)
        return cls(settings, vocab, sorted({label for _, label in train}))

    def encode(self, texts: Iterable[str]) -> Tensor:
        return encode_texts([separate_punctuation(text) for text in texts], self.vocab, self.settings.max_len)

    def probabilities(self, tokens: Tensor) -> Tensor:
        """``[texts, classes]``, of encoded texts."""
        probabilities = torch.empty(len(tokens), len(self.labels))
        lengths = text_lengths(tokens)
        self.model.eval()
        with torch.no_grad():
            for batch in torch.split(lengths.argsort(stable=True), self.BATCH_SIZE):  # alike in length: little padding
                probabilities[batch] = self.model(trimmed(tokens, lengths, batch)).softmax(dim=1)
        return probabilities

    def predict(self, texts: Iterable[str]) -> list[tuple[str, float]]:
        """The most probable label of each text, and its probability."""
        best = self.probabilities(self.encode(texts)).max(dim=1)
        return [(self.labels[idx], p) for p, idx in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def accuracy(self, examples: Sequence[Example]) -> float:
        """Share of the examples whose label is the one predicted."""
        predictions = self.predict([example.text for example in examples])
        hits = sum(label == example.label for (label, _), example in zip(predictions, examples, strict=True))
        return hits / len(examples)

    def save(self, path: Path, epoch: Epoch) -> None:
        """Write one file that ``torch.load(path, weights_only=True)`` reads.

        It appears whole or not at all: whatever interrupts the writing, the file that was there before stays.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": asdict(self.settings),
            "vocab": self.vocab,
            "labels": self.labels,
            "epoch": epoch._asdict(),
            "state_dict": self.model.state_dict(),
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(content, file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Read what `save` wrote, without running any code that the file may hold.

        Raises:
            ModelFileError: the file is missing, damaged, or not one of ours.
        """
        content = _read_model_file(path)
        try:
            classifier = cls(Settings(**content["settings"]), content["vocab"], content["labels"])
            classifier.model.load_state_dict(content["state_dict"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelFileError(f"{path} is damaged: its parts do not fit together ({error})") from error
        return classifier


def _read_model_file(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # on arbitrary bytes, torch's unpickler raises whatever they lead it to
        raise ModelFileError(
            f"{path} is damaged, or not a model saved by python -m pyattn train ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path} was not saved by python -m pyattn train")
    if content.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has version {content.get('version')} of the model format, and this pyattn reads version {VERSION}"
        )
    return content


# ---- Training ----

WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
# Words replaced by UNK in training, so that its embedding is trained even where every word of a corpus fits into the
# vocabulary. On the standard library's docstrings it costs nothing: validation accuracy 0.835 with it and without
# (means over two seeds, November 2026).
WORD_DROPOUT = 0.2
POOLED_BATCHES = 8


def train_epochs(classifier: Classifier, split: Split, *, epochs: int, batch_size: int, lr: float) -> Iterator[Epoch]:
    """Train on ``split.train``, and yield after each epoch with the accuracy on ``split.validation``.

    AdamW; the learning rate rises to `lr` over the first tenth of all steps and falls to zero along a cosine. Random
    numbers are drawn from torch's generator: ``torch.manual_seed`` makes a run repeatable.
    """
    tokens = classifier.encode([example.text for example in split.train])
    class_of = {label: idx for idx, label in enumerate(classifier.labels)}
    targets = torch.tensor([class_of[example.label] for example in split.train])
    lengths = text_lengths(tokens)
    model = classifier.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(tokens) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP_SHARE * steps), 1) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for number in range(1, epochs + 1):
        started = time.monotonic()
        total_loss = 0.0
        model.train()
        for batch in progress(training_batches(lengths, batch_size), f"epoch {number}/{epochs}"):
            logits = model(without_some_words(trimmed(tokens, lengths, batch)))
            loss = F.cross_entropy(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
        accuracy = classifier.accuracy(split.validation)
        yield Epoch(number, total_loss / len(tokens), accuracy, time.monotonic() - started)


def training_batches(lengths: Tensor, batch_size: int) -> list[Tensor]:
    """Indices of random batches of texts that are alike in length.

    Texts are sorted within random pools of a few batches: less padding and so less time, at the price of batches that
    are a little less random.
    """
    pools = torch.split(torch.randperm(len(lengths)), POOLED_BATCHES * batch_size)
    by_length = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
    batches = [batch for pool in by_length for batch in torch.split(pool, batch_size)]
    return [batches[idx] for idx in torch.randperm(len(batches)).tolist()]


def without_some_words(tokens: Tensor) -> Tensor:
    """`tokens` with a random share of the words unknown."""
    dropped = (torch.rand(tokens.shape) < WORD_DROPOUT) & (tokens != PAD)
    return tokens.masked_fill(dropped, UNK)


def text_lengths(tokens: Tensor) -> Tensor:
    """Number of tokens of each text, all of which precede its padding."""
    return (tokens != PAD).sum(dim=1)


def trimmed(tokens: Tensor, lengths: Tensor, batch: Tensor) -> Tensor:
    """The rows of a batch, as wide as its longest text."""
    return tokens[batch, : int(lengths[batch].max())]


# ---- The yardstick ----


def tfidf_accuracy(split: Split) -> float | None:
    """Held-out accuracy of TF-IDF and logistic regression, or None where scikit-learn is not installed.

    It chooses no epoch, so it learns from the validation part too. Sublinear term frequencies were the best of the
    vectorizer's usual settings on the standard library's docstrings.
    """
    if optional_module("sklearn") is None:
        return None
    text, linear_model, pipeline = (
        optional_module(f"sklearn.{name}") for name in ("feature_extraction.text", "linear_model", "pipeline")
    )
    # \w+: the default pattern drops words of one letter, and with them every word of some languages.
    vectorizer = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    yardstick = pipeline.make_pipeline(vectorizer, linear_model.LogisticRegression(max_iter=1000))
    seen = split.train + split.validation
    yardstick.fit([example.text for example in seen], [example.label for example in seen])
    return float(yardstick.score([example.text for example in split.test], [example.label for example in split.test]))
