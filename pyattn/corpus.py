"""Labelled texts: the standard library's docstrings, or columns of a CSV file; and their split into parts."""

import ast
import importlib
import os
import random
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._progress import progress


class CorpusError(ValueError):
    """There is nothing to train on or to predict from, and why."""


class Example(NamedTuple):
    text: str
    label: str


class Split(NamedTuple):
    """`validation` chooses among epochs; `test` is held out for the final figure alone."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


# ---- The standard library's docstrings ----

PACKAGES = 16
# The largest package has seven times the docstrings of the sixteenth; the cap keeps guessing it below one in ten.
PER_PACKAGE = 300
MIN_WORDS = 5  # "Return the name." could be from anywhere

# Foreign code, and tests: some distributions leave those out, and the task should be much the same everywhere.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def standard_library_docstrings() -> list[Example]:
    """The docstrings of the running Python's standard library, labelled by package.

    Sources are parsed, not imported. The `PACKAGES` packages (top-level names; a leading underscore is dropped) with
    most docstrings are taken, at most `PER_PACKAGE` of each. Whitespace is normalised. No docstring occurs twice: a
    copy could be trained on and held out at once, and one that several packages share belongs to none.

    Raises:
        CorpusError: this Python came without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    packages: dict[str, set[str]] = defaultdict(set)
    for path in progress(_sources(root), "reading the standard library"):
        package = path.relative_to(root).parts[0].removesuffix(".py").lstrip("_")
        for docstring in _docstrings(path):
            packages[docstring].add(package)
    by_package: dict[str, list[str]] = defaultdict(list)
    for docstring, owners in packages.items():
        if len(owners) == 1 and len(docstring.split()) >= MIN_WORDS:
            by_package[next(iter(owners))].append(docstring)
    if len(by_package) < 2:
        raise CorpusError(
            f"no docstrings found under {root}: this Python seems to come without its sources. "
            "Train on a file of your own: --csv FILE --text-column C --label-column C"
        )
    largest = sorted(by_package, key=lambda package: (-len(by_package[package]), package))[:PACKAGES]
    choice = random.Random(0)  # which docstrings beyond the cap are left out is part of the task, not of a run's seed
    return [
        Example(docstring, package)
        for package in sorted(largest)
        for docstring in choice.sample(by_package[package], min(PER_PACKAGE, len(by_package[package])))
    ]


def _sources(root: Path) -> list[Path]:
    """Python files under `root`, in an order that does not depend on the file system."""
    sources = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        sources += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return sources


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours to report
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files; ValueError: null bytes
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield " ".join(docstring.split())


# ---- CSV files ----


def read_csv_columns(path: str, columns: Sequence[str], encoding: str) -> Any:
    """The named columns of a CSV file ("-": standard input) as a pandas DataFrame of strings, missing values included.

    Raises:
        CorpusError: pandas, the file or a column is missing; the file is empty, malformed or in another encoding.
    """
    pandas = optional_module("pandas")
    if pandas is None:
        raise CorpusError("reading a CSV file takes pandas: pip install 'pyattn[csv]'")
    try:
        # As strings: a column 1, 0, <missing> would else be read as the labels 1.0 and 0.0.
        frame = pandas.read_csv(sys.stdin.buffer if path == "-" else path, dtype=str, encoding=encoding)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error
    except pandas.errors.EmptyDataError as error:
        raise CorpusError(f"{path} is empty") from error
    except pandas.errors.ParserError as error:
        raise CorpusError(f"{path} is not well-formed CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(wrong_encoding(path, error)) from error
    except LookupError as error:
        raise CorpusError(f"--encoding: {error}; utf-8, latin-1, cp1252 and utf-16 are common ones") from error
    for column in columns:
        if column not in frame.columns:
            raise CorpusError(f"{path} has no column {column!r}; its columns are {', '.join(map(repr, frame.columns))}")
    return frame[list(columns)]


def csv_examples(path: str, text_column: str, label_column: str, encoding: str = "utf-8") -> tuple[list[Example], int]:
    """The rows of a CSV file that have both a text and a label, and how many have not."""
    if text_column == label_column:
        raise CorpusError(f"--text-column and --label-column both name {text_column!r}")
    frame = read_csv_columns(path, [text_column, label_column], encoding)
    complete = frame.dropna()
    if complete.empty:
        raise CorpusError(f"{path} has {len(frame)} rows, and none with both {text_column!r} and {label_column!r}")
    examples = [Example(*row) for row in complete.itertuples(index=False, name=None)]
    return examples, len(frame) - len(complete)


def wrong_encoding(path: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"{path} is not {error.encoding}: byte 0x{byte:02x} at offset {error.start} ({error.reason}). "
        "Name its encoding, for example --encoding latin-1 or --encoding cp1252"
    )


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # it is installed, and something that it needs is not
        return None


# ---- Parts ----

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


def split_examples(examples: Sequence[Example], seed: int) -> Split:
    """Split at random within each label; a label with fewer than three examples is trained on only.

    Raises:
        CorpusError: fewer than two labels, or none with an example to hold out.
    """
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    if len(by_label) < 2:
        raise CorpusError(f"a classifier needs at least two labels, and all {len(examples)} texts have {[*by_label]}")
    shuffle = random.Random(seed).shuffle
    split = Split([], [], [])
    for label in sorted(by_label):
        group = by_label[label]
        shuffle(group)
        test, validation = (
            max(1, round(share * len(group))) if len(group) >= 3 else 0 for share in (TEST_SHARE, VALIDATION_SHARE)
        )
        split.test.extend(group[:test])
        split.validation.extend(group[test : test + validation])
        split.train.extend(group[test + validation :])
    if not split.test:
        raise CorpusError(
            f"{len(examples)} texts have {len(by_label)} labels, none of them three times: nothing can be held out. "
            "Is the label column the right one?"
        )
    return split


def majority_share(split: Split) -> float:
    """Held-out accuracy of always answering the label most frequent in training."""
    label, _ = Counter(example.label for example in split.train).most_common(1)[0]
    return sum(example.label == label for example in split.test) / len(split.test)
