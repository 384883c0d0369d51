"""The command line: ``python -m pyattn train`` and ``python -m pyattn predict``."""

import argparse
import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from . import _C
from .corpus import (
    CorpusError,
    Example,
    Split,
    csv_examples,
    majority_share,
    read_csv_columns,
    split_examples,
    standard_library_docstrings,
    wrong_encoding,
)
from .training import Classifier, Epoch, ModelFileError, Settings, tfidf_accuracy, train_epochs

FAILURE, INTERRUPTED = 2, 130


class UsageError(Exception):
    """Options that do not go together, or name what is not there."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return train(options) if options.command == "train" else predict(options)
    except (UsageError, CorpusError, ModelFileError, OSError) as error:
        print(f"pyattn: error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m pyattn",
        description="Train a small transformer text classifier whose attention is pyattn's, and predict with it.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,predict}")
    default = "(default: %(default)s)"
    settings = Settings()

    train = commands.add_parser(
        "train",
        help="train on the standard library's docstrings, or on a CSV file, and save the model",
        description="Train a text classifier, report its accuracy on held-out texts beside TF-IDF with logistic "
        "regression (where scikit-learn is installed), and save it as one file. Without --csv: the docstrings of the "
        "installed Python standard library, to be assigned to their packages. The best epoch so far is always saved, "
        "so interrupting (Ctrl-C) loses no more than the epoch under way.",
    )
    data = train.add_argument_group("data")
    data.add_argument("--csv", metavar="FILE", help="train on this file, read by pandas; takes the two columns below")
    data.add_argument("--text-column", metavar="C", help="the column of texts")
    data.add_argument("--label-column", metavar="C", help="the column of labels")
    data.add_argument("--encoding", default="utf-8", metavar="E", help=f"the file's encoding {default}")
    data.add_argument(
        "--max-vocab", type=positive_int, default=settings.max_vocab, metavar="N", help=f"words to know {default}"
    )
    data.add_argument(
        "--max-len", type=positive_int, default=settings.max_len, metavar="N", help=f"words to read per text {default}"
    )
    loop = train.add_argument_group("training")
    loop.add_argument("--epochs", type=positive_int, default=12, metavar="N", help=f"passes over the texts {default}")
    loop.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help=f"texts per step {default}")
    loop.add_argument("--lr", type=positive_float, default=2e-3, metavar="X", help=f"peak learning rate {default}")
    loop.add_argument("--seed", type=int, default=0, metavar="N", help=f"of split, weights and batches {default}")
    train.add_argument(
        "--output", type=Path, default="classifier.pt", metavar="FILE", help=f"where to save the model {default}"
    )

    predict = commands.add_parser(
        "predict",
        help="label texts with a saved model",
        description="Read texts, one per line, and print for each its label and the label's probability, with a tab "
        "between them.",
    )
    predict.add_argument("model", type=Path, metavar="MODEL", help="a file saved by the train command")
    predict.add_argument("file", nargs="?", default="-", metavar="FILE", help="the texts (default: standard input)")
    predict.add_argument("--text-column", metavar="C", help="read FILE as CSV, and the texts from its column C")
    predict.add_argument("--encoding", default="utf-8", metavar="E", help=f"the texts' encoding {default}")

    for command in (train, predict):
        command.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's choice)")
    return top


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


# ---- train ----


class BestEpoch:
    """The epoch with the best validation accuracy so far, in its file and in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epoch: Epoch | None = None

    def offer(self, classifier: Classifier, epoch: Epoch) -> bool:
        """Save the model as it is after `epoch`, unless an earlier one was better."""
        # The later of two equals is kept: the learning rate falls, so it is the more settled one.
        if self.epoch is not None and epoch.validation_accuracy < self.epoch.validation_accuracy:
            return False
        classifier.save(self.path, epoch)
        self.epoch, self.weights = epoch, copy.deepcopy(classifier.model.state_dict())
        return True

    def __str__(self) -> str:
        if self.epoch is None:
            return f"no epoch was finished, and {self.path} was not written"
        return f"{self.path} holds epoch {self.epoch.number}, validation accuracy {self.epoch.validation_accuracy:.3f}"


def train(options: argparse.Namespace) -> int:
    check_output(options.output)
    best = BestEpoch(options.output)
    try:
        split = split_examples(read_examples(options), options.seed)
        torch.manual_seed(options.seed)
        classifier = Classifier.untrained(split.train, Settings(max_vocab=options.max_vocab, max_len=options.max_len))
        introduce(classifier, split)
        for epoch in train_epochs(
            classifier, split, epochs=options.epochs, batch_size=options.batch_size, lr=options.lr
        ):
            saved = best.offer(classifier, epoch)
            print(
                f"epoch {epoch.number:2}/{options.epochs}   loss {epoch.loss:.3f}   validation accuracy "
                f"{epoch.validation_accuracy:.3f}   {epoch.time_s:.1f} s{'   saved' if saved else ''}",
                flush=True,
            )
        classifier.model.load_state_dict(best.weights)
        report(classifier, split)
        show_reloaded(classifier, split, options.output)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {best}", file=sys.stderr)
        return INTERRUPTED
    return 0


def check_output(path: Path) -> None:
    """Fail before training rather than after it."""
    if path.is_dir():
        raise UsageError(f"--output {path} is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {path}: the directory {path.parent} is not writable")


def read_examples(options: argparse.Namespace) -> list[Example]:
    if options.csv is None:
        if options.text_column or options.label_column:
            raise UsageError("--text-column and --label-column name columns of a --csv FILE, and none was given")
        examples = standard_library_docstrings()
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"{len(examples)} docstrings of the standard library of Python {version}, to be assigned to a package")
        return examples
    if options.text_column is None or options.label_column is None:
        raise UsageError("--csv takes --text-column C and --label-column C as well")
    examples, incomplete = csv_examples(options.csv, options.text_column, options.label_column, options.encoding)
    without = f"; {incomplete} more lack a text or a label and are left out" if incomplete else ""
    print(f"{len(examples)} texts of {options.csv}{without}")
    return examples


def introduce(classifier: Classifier, split: Split) -> None:
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    seen = {example.text for example in split.train}
    copies = sum(example.text in seen for example in split.test)
    print(f"{len(classifier.labels)} labels: {shortened(', '.join(classifier.labels), 100)}")
    print(f"{len(split.train)} texts to train on, {len(split.validation)} for validation, {len(split.test)} held out")
    if copies:
        print(f"note: {copies} held-out texts occur in training too; the accuracies below are flattered by them")
    print(
        f"transformer of {parameters:,} parameters, {len(classifier.vocab):,} words; "
        f"attention: pyattn ({_C.isa()}); {torch.get_num_threads()} threads",
        flush=True,
    )


def report(classifier: Classifier, split: Split) -> None:
    print(f"\naccuracy on the {len(split.test)} held-out texts")
    print(f"  transformer, pyattn's attention   {classifier.accuracy(split.test):.3f}")
    try:
        tfidf = tfidf_accuracy(split)
    except ValueError as error:
        print(f"  TF-IDF + logistic regression      not possible: {error}")
    else:
        missing = "not measured (pip install 'pyattn[sklearn]')"
        print(f"  TF-IDF + logistic regression      {missing if tfidf is None else f'{tfidf:.3f}'}")
    print(f"  always the most frequent label    {majority_share(split):.3f}", flush=True)


def show_reloaded(classifier: Classifier, split: Split, path: Path) -> None:
    """Load the file that was saved and let it predict, beside the model in memory."""
    reloaded = Classifier.load(path)
    tokens = classifier.encode([example.text for example in split.test])
    difference = (classifier.probabilities(tokens) - reloaded.probabilities(tokens)).abs().max().item()
    print(f"\nreloaded {path} ({path.stat().st_size / 1e6:.1f} MB): held-out probabilities differ by {difference:.1g}")
    step = max(1, len(split.test) // 5)
    for text, label in split.test[::step][:5]:
        ((predicted, probability),) = reloaded.predict([text])
        verdict = "right" if predicted == label else f"but it is {label}"
        print(f"  {shortened(text, 60):60}  {predicted} {probability:.2f}, {verdict}")
    print(f"\nTo use it: python -m pyattn predict {path} FILE")


def shortened(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


# ---- predict ----

CHUNK = 1024  # texts predicted at once


def predict(options: argparse.Namespace) -> int:
    classifier = Classifier.load(options.model)
    try:
        for texts in read_texts(options):
            for label, probability in classifier.predict(texts):
                print(f"{label}\t{probability:.4f}")
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail once more
    return 0


def read_texts(options: argparse.Namespace) -> Iterator[list[str]]:
    """The texts that the options name, in chunks."""
    if options.text_column is not None:
        frame = read_csv_columns(options.file, [options.text_column], options.encoding)
        yield from chunks(frame[options.text_column].fillna(""), CHUNK)
        return
    from_stdin = options.file == "-"
    try:
        with open(0 if from_stdin else options.file, encoding=options.encoding, closefd=not from_stdin) as file:
            # A person typing gets each answer at once.
            yield from chunks((line.rstrip("\n") for line in file), 1 if file.isatty() else CHUNK)
    except UnicodeDecodeError as error:
        raise CorpusError(wrong_encoding(options.file, error)) from error
    except LookupError as error:
        raise UsageError(f"--encoding: {error}") from error


def chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


if __name__ == "__main__":
    sys.exit(main())
