"""Where labelled texts come from: docstrings of a library, columns of a CSV file; and their split."""

import sys
import sysconfig
from collections import Counter

import pytest

from pyattn import corpus
from pyattn.corpus import (
    CorpusError,
    Example,
    csv_examples,
    majority_share,
    split_examples,
    standard_library_docstrings,
)

# ---- Docstrings ----


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Write modules into what the corpus takes for the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    def write(**modules):
        for name, source in modules.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(source if isinstance(source, bytes) else source.encode())

    return write


def test_docstrings_of_modules_classes_and_functions_are_labelled_by_package(library):
    library(
        _lock='"""A module about locks and keys."""\nclass Lock:\n  """A lock that\n\n  many threads share."""\n',
        mail__in__header='async def parse():\n  """Parse the header of a message."""\n  def inner(): "Too short."\n',
    )
    assert sorted(standard_library_docstrings()) == [
        Example("A lock that many threads share.", "lock"),
        Example("A module about locks and keys.", "lock"),
        Example("Parse the header of a message.", "mail"),
    ]


def test_no_docstring_is_there_twice(library):
    library(
        a='def f(): """The same words in two packages."""\ndef g(): """Twice within the one package."""\n',
        b='def f(): """The same words in two packages."""\ndef g(): """Only in package b, once."""\n',
        a__in__b='def g():\n  """Twice within the\n  one package."""\n',
    )
    assert set(standard_library_docstrings()) == {
        ("Twice within the one package.", "a"),
        ("Only in package b, once.", "b"),
    }


def test_sources_that_do_not_parse_and_foreign_ones_are_passed_over(library):
    doc = '"""Five words or more of {}."""\n'
    library(
        good=doc.format("good"),
        escapes=doc.format("escapes") + "path = '\\d'\n",
        latin=b"# coding: latin-1\n" + doc.format("caf\xe9").encode("latin-1"),
        broken=doc.format("broken") + "def (:\n",
        null=b'"""Five words or more of null."""\n\0',
        undecodable=b'"""Five words or more of \xff."""\n',
        **{"site-packages__in__foreign": doc.format("foreign"), "test__in__case": doc.format("tests")},
    )
    assert sorted(standard_library_docstrings()) == [
        ("Five words or more of café.", "latin"),
        ("Five words or more of escapes.", "escapes"),
        ("Five words or more of good.", "good"),
    ]


def test_the_largest_packages_are_taken_up_to_the_cap(library, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", 2)
    monkeypatch.setattr(corpus, "PER_PACKAGE", 3)
    for name, count in (("small", 1), ("large", 5), ("middle", 2)):
        library(**{name: "".join(f'def f{i}(): """Docstring number {i} of package {name}."""\n' for i in range(count))})
    examples = standard_library_docstrings()
    assert Counter(example.label for example in examples) == {"large": 3, "middle": 2}
    assert examples == standard_library_docstrings()


def test_a_python_without_sources_is_an_error(library):
    with pytest.raises(CorpusError, match="without its sources.*--csv"):
        standard_library_docstrings()


# ---- CSV ----


def test_csv_is_read_as_pandas_reads_it(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(
        '\ufeffid,text,label\n1,"Good, ""very"" good\nindeed",1\n2,,1\n3,Bad,\n4,NA,0\n5,caf\u00e9,0\n',
        encoding="utf-8",
    )
    # Quotes, commas and newlines inside a field; missing texts and labels; and labels that stay "1", not "1.0".
    assert csv_examples(str(path), "text", "label") == ([('Good, "very" good\nindeed', "1"), ("café", "0")], 3)
    assert csv_examples(str(path), "label", "id")[0][0] == ("1", "1")


def test_csv_in_another_encoding_is_read_when_named(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_bytes("text,label\ncaf\xe9,good\n".encode("latin-1"))
    with pytest.raises(CorpusError, match="reviews.csv is not utf-8: byte 0xe9.*--encoding latin-1"):
        csv_examples(str(path), "text", "label")
    assert csv_examples(str(path), "text", "label", "latin-1") == ([("café", "good")], 0)
    with pytest.raises(CorpusError, match="--encoding: unknown encoding: klingon"):
        csv_examples(str(path), "text", "label", "klingon")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "reviews.csv is empty"),
        ("text,label\n", "has 0 rows, and none with both 'text' and 'label'"),
        ("text,label\ngood,\n,bad\n", "has 2 rows, and none with both"),
        ("text,stars\ngood,1\n", "has no column 'label'; its columns are 'text', 'stars'"),
        ("text,label\na,b\na,b,c,d\n", "is not well-formed CSV: .*line 3"),
    ],
)
def test_csv_without_examples_is_an_error(tmp_path, content, message):
    path = tmp_path / "reviews.csv"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        csv_examples(str(path), "text", "label")


def test_csv_errors_name_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="cannot read .*absent.csv: No such file"):
        csv_examples(str(tmp_path / "absent.csv"), "text", "label")
    with pytest.raises(CorpusError, match="both name 'text'"):
        csv_examples("reviews.csv", "text", "text")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CorpusError, match=r"takes pandas: pip install 'pyattn\[csv\]'"):
        csv_examples("reviews.csv", "text", "label")


# ---- Parts ----

EXAMPLES = [
    Example(f"{label} {idx}", label) for label, count in (("a", 50), ("b", 20), ("c", 2)) for idx in range(count)
]


def test_split_holds_out_a_share_of_each_label_and_loses_nothing():
    split = split_examples(EXAMPLES, seed=0)
    assert [Counter(example.label for example in part) for part in split] == [
        {"a": 35, "b": 14, "c": 2},
        {"a": 5, "b": 2},
        {"a": 10, "b": 4},
    ]
    assert sorted(sum(split, [])) == sorted(EXAMPLES)
    assert majority_share(split) == 10 / 14


def test_split_follows_the_seed():
    assert split_examples(EXAMPLES, seed=1) == split_examples(EXAMPLES, seed=1) != split_examples(EXAMPLES, seed=2)


def test_split_needs_two_labels_and_something_to_hold_out():
    with pytest.raises(CorpusError, match=r"at least two labels, and all 50 texts have \['a'\]"):
        split_examples(EXAMPLES[:50], seed=0)
    with pytest.raises(CorpusError, match="5 texts have 5 labels, none of them three times.*right one"):
        split_examples([Example("text", str(idx)) for idx in range(5)], seed=0)
