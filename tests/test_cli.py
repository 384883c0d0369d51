"""The command line, from raw text to a file that predicts. Its own process only where signals or pipes matter."""

import os
import pickle
import re
import signal
import subprocess
import sys

import pytest
import torch

from pyattn import training
from pyattn.__main__ import main
from pyattn._progress import progress
from pyattn.training import FORMAT, Classifier, Epoch, ModelFileError, Settings

SMALL = ["--epochs", "2", "--batch-size", "8"]
COLUMNS = ["--text-column", "text", "--label-column", "label"]
GOOD, BAD = "a truly wonderful and clever film", "a dull film; it was a waste of time"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Two labels that a few epochs tell apart, every text different, with quotes and commas."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rows = [
        f'"{text}, seen ""{number}"" times",{label}' for number in range(40) for text, label in ((GOOD, 1), (BAD, 0))
    ]
    path.write_text("\n".join(["text,label", *rows, ",1", "no label,"]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def model(reviews, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "reviews.pt"
    assert main(["train", "--csv", reviews, *COLUMNS, "--epochs", "6", "--batch-size", "8", "--output", str(path)]) == 0
    return path


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


# ---- train ----


def test_train_reports_saves_reloads_and_predicts(reviews, tmp_path, capsys):
    path = tmp_path / "model.pt"
    assert main(["train", "--csv", reviews, *COLUMNS, "--epochs", "6", "--batch-size", "8", "--output", str(path)]) == 0
    output = capsys.readouterr().out
    assert "80 texts of" in output and "2 more lack a text or a label" in output
    assert "2 labels: 0, 1" in output
    assert "56 texts to train on, 8 for validation, 16 held out" in output
    assert re.search(r"epoch  6/6 +loss 0\.\d+ +validation accuracy 1\.000", output)
    assert re.search(r"transformer, pyattn's attention +1\.000", output)
    assert re.search(r"TF-IDF \+ logistic regression +1\.000", output)
    assert re.search(r"always the most frequent label +0\.500", output)
    assert "held-out probabilities differ by 0" in output
    assert os.listdir(tmp_path) == ["model.pt"]


def test_the_file_loads_with_weights_only_and_carries_everything(model):
    content = torch.load(model, weights_only=True)
    assert content["format"] == FORMAT and content["version"] == 1
    assert content["labels"] == ["0", "1"]
    assert content["vocab"]["wonderful"] >= 2
    assert content["settings"]["max_len"] == 64
    assert content["epoch"]["validation_accuracy"] == 1.0


def test_a_seed_fixes_the_model(reviews, tmp_path):
    def trained(seed, name):
        path = tmp_path / name
        assert main(["train", "--csv", reviews, *COLUMNS, *SMALL, "--seed", seed, "--output", str(path)]) == 0
        return state_of(path)

    one, again, other = trained("1", "one.pt"), trained("1", "again.pt"), trained("2", "other.pt")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_the_best_epoch_is_the_one_saved(reviews, tmp_path, monkeypatch, capsys):
    accuracies = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(Classifier, "accuracy", lambda self, examples: next(accuracies, 0.0))
    path = tmp_path / "model.pt"
    assert main(["train", "--csv", reviews, *COLUMNS, "--epochs", "4", "--output", str(path)]) == 0
    assert torch.load(path, weights_only=True)["epoch"]["number"] == 3
    output = capsys.readouterr().out
    assert [line.endswith("saved") for line in output.splitlines() if line.startswith("epoch")] == [
        True,
        True,
        True,
        False,
    ]
    assert "held-out probabilities differ by 0" in output  # the model in memory is the best one too


def test_interrupting_keeps_the_finished_epochs(reviews, tmp_path):
    path = tmp_path / "model.pt"
    arguments = ["train", "--csv", reviews, *COLUMNS, "--epochs", "100000", "--output", str(path)]
    # A shell that starts the tests in the background has SIGINT ignored, and so would the program that they start.
    heeding = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('pyattn', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch  1/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    message = re.search(r"interrupted: (.*) holds epoch (\d+), validation accuracy [\d.]+$", errors.strip())
    assert message[1] == str(path)
    assert int(message[2]) == torch.load(path, weights_only=True)["epoch"]["number"]
    assert "Traceback" not in errors


def test_interrupting_the_first_epoch_leaves_an_older_file(reviews, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    path = tmp_path / "model.pt"
    path.write_bytes(b"older")
    monkeypatch.setattr(training.F, "cross_entropy", interrupt)
    assert main(["train", "--csv", reviews, *COLUMNS, "--output", str(path)]) == 130
    assert f"interrupted: no epoch was finished, and {path} was not written" in capsys.readouterr().err
    assert path.read_bytes() == b"older"


def test_interrupting_the_writing_leaves_the_older_file(tmp_path, monkeypatch):
    def write_half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "model.pt"
    path.write_bytes(b"older")
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        Classifier(Settings(), {"<PAD>": 0, "<UNK>": 1}, ["a", "b"]).save(path, Epoch(1, 0.0, 0.0, 0.0))
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_scikit_learn_is_optional(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    path = str(tmp_path / "model.pt")
    assert main(["train", "--csv", reviews, *COLUMNS, "--epochs", "1", "--output", path]) == 0
    assert "not measured (pip install 'pyattn[sklearn]')" in capsys.readouterr().out


def test_texts_without_words_and_held_out_copies_are_reported(tmp_path, capsys):
    csv = tmp_path / "symbols.csv"
    csv.write_text("text,label\n" + "!!!,a\n???,b\n" * 10)
    path = str(tmp_path / "model.pt")
    assert main(["train", "--csv", str(csv), *COLUMNS, "--epochs", "1", "--output", path]) == 0
    output = capsys.readouterr().out
    assert "note: 4 held-out texts occur in training too" in output
    assert "TF-IDF + logistic regression      not possible: empty vocabulary" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--csv", "{csv}"], "--csv takes --text-column C and --label-column C as well"),
        (["--text-column", "text"], "name columns of a --csv FILE, and none was given"),
        (["--csv", "{csv}", "--text-column", "text", "--label-column", "stars"], "has no column 'stars'"),
        (["--csv", "/nonexistent.csv", *COLUMNS], "cannot read /nonexistent.csv"),
        (["--csv", "{csv}", *COLUMNS, "--output", "/nonexistent/model.pt"], "there is no directory /nonexistent"),
        (["--csv", "{csv}", *COLUMNS, "--output", "/"], "--output / is a directory"),
    ],
)
def test_train_refuses_what_cannot_work(reviews, capsys, arguments, message):
    assert main(["train", *(argument.format(csv=reviews) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("pyattn: error: ") and message in errors


@pytest.mark.parametrize(
    "content, message",
    [("", "is empty"), ("text,label\n" + "good,1\n" * 9, "at least two labels, and all 9 texts have ['1']")],
)
def test_train_refuses_files_that_teach_nothing(tmp_path, capsys, content, message):
    csv = tmp_path / "reviews.csv"
    csv.write_text(content)
    assert main(["train", "--csv", str(csv), *COLUMNS, "--output", str(tmp_path / "model.pt")]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["reviews.csv"]


@pytest.mark.parametrize("option, value", [("--epochs", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--threads", "two")])
def test_options_out_of_range_are_usage_errors(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", option, value])
    assert stopped.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    assert list(progress("abcd", "letters")) == list("abcd")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    items = progress("abcd", "letters")
    assert next(items) == "a"
    assert capsys.readouterr().err == f"\rletters [{' ' * 30}] 0/4"
    items.close()  # as an interrupt would
    assert capsys.readouterr().err == "\r\033[K"


# ---- predict ----


def test_predict_reads_a_file_and_standard_input_alike(model, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{GOOD}\n\n{BAD}")  # an empty line is a text, so that answers stay beside their lines
    assert main(["predict", str(model), str(texts)]) == 0
    output = capsys.readouterr().out
    labels, probabilities = zip(*(line.split("\t") for line in output.splitlines()), strict=True)
    assert (labels[0], labels[2]) == ("1", "0") and len(labels) == 3
    assert all(0.5 <= float(probability) <= 1 for probability in probabilities)

    command = [sys.executable, "-m", "pyattn", "predict", str(model), "--threads", "1"]  # as in this process
    piped = subprocess.run(command, input=texts.read_bytes(), capture_output=True, timeout=300)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout.decode() == output


def test_predict_reads_a_column(model, tmp_path, capsys):
    csv = tmp_path / "new.csv"
    csv.write_bytes(f'id,text\n1,"{GOOD},\nindeed"\n2,\n3,caf\xe9: {BAD}\n'.encode("latin-1"))
    assert main(["predict", str(model), str(csv), "--text-column", "text", "--encoding", "latin-1"]) == 0
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert (labels[0], labels[2]) == ("1", "0") and len(labels) == 3


def test_predict_does_not_depend_on_the_company(model):
    classifier = Classifier.load(model)
    texts = [GOOD, BAD, "", "unknown words only", "wonderful " * 100] * 20
    together = classifier.probabilities(classifier.encode(texts))
    alone = torch.cat([classifier.probabilities(classifier.encode([text])) for text in texts])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


def test_predict_stops_quietly_when_its_reader_does(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "pyattn", "predict", str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    _, errors = process.communicate(f"{GOOD}\n".encode() * 3000, timeout=300)
    assert (process.returncode, errors) == (0, b"")


def test_predict_names_a_wrong_encoding(model, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_bytes(b"caf\xe9\n")
    assert main(["predict", str(model), str(texts)]) == 2
    assert "texts.txt is not utf-8: byte 0xe9 at offset 3" in capsys.readouterr().err
    assert main(["predict", str(model), str(texts), "--encoding", "klingon"]) == 2
    assert "--encoding: unknown encoding: klingon" in capsys.readouterr().err
    assert main(["predict", str(model), str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt" in capsys.readouterr().err


# ---- model files ----


class Malicious:
    """Unpickling it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_damaged_and_foreign_files_are_refused(model, tmp_path, capsys):
    content = torch.load(model, weights_only=True)
    whole = model.read_bytes()
    path, trace = tmp_path / "broken.pt", tmp_path / "trace"
    cases = [
        (b"", "is damaged, or not a model"),
        (b"hello", "is damaged, or not a model"),
        (whole[: len(whole) // 2], "is damaged, or not a model"),
        (pickle.dumps(Malicious(str(trace))), "is damaged, or not a model"),
        ({"weight": torch.zeros(2)}, "was not saved by python -m pyattn train"),
        ([1, 2], "was not saved by python -m pyattn train"),
        (content | {"version": 9}, "has version 9 of the model format, and this pyattn reads version 1"),
        (
            {key: content[key] for key in content if key != "vocab"},
            "is damaged: its parts do not fit together ('vocab')",
        ),
        (content | {"labels": ["0", "1", "2"]}, "is damaged: its parts do not fit together"),
        (content | {"settings": {"depth": 3}}, "is damaged: its parts do not fit together"),
    ]
    for broken, message in cases:
        path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
        assert main(["predict", str(path)]) == 2, message
        errors = capsys.readouterr().err
        assert errors.startswith(f"pyattn: error: {path} ") and message in errors
    assert not trace.exists()
    with pytest.raises(ModelFileError, match="cannot read .*absent.pt: No such file"):
        Classifier.load(tmp_path / "absent.pt")


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), ([], 2), (["train", "--help"], 0)])
def test_help_names_what_there_is(arguments, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    shown = "".join(capsys.readouterr())
    assert ("--label-column C" if arguments[:1] == ["train"] else "{train,predict}") in shown
