"""The choice of backend: explain, use_backend, show_config, and what `import pyattn` brings along."""

import importlib.util
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyattn
from pyattn import _C, _dispatch
from pyattn._attention_backends import ATTENTION, TritonAttention
from pyattn._problem import AttentionConfig


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    return q, k, v


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_explain_names_the_backend_and_every_refusal(qkv: tuple[Tensor, ...]) -> None:
    answer = pyattn.explain(pyattn.attention, *qkv, mask=pyattn.Causal())
    assert (answer.op, answer.backend, answer.memory) == ("attention", "cpu", "O(q_len + kv_len)")
    assert answer.isa == pyattn._C.isa()
    assert set(answer.refusals) == {"triton", "reference"}
    assert "query is on cpu, not on a CUDA device" in answer.refusals["triton"]
    assert "use_backend('reference')" in answer.refusals["reference"][0]
    for text in ("backend", "cpu", "not triton", "not reference"):
        assert text in str(answer)


@pytest.mark.parametrize("name", ["attention", "attention_with_lse", "scaled_dot_product_attention"])
def test_explain_takes_every_attention_function(name: str, qkv: tuple[Tensor, ...]) -> None:
    assert pyattn.explain(getattr(pyattn, name), *qkv).backend == "cpu"


def test_explain_runs_no_kernel_and_draws_no_number(qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*args: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(_C, "attention_forward", no_kernel)
    state = torch.get_rng_state()
    pyattn.explain(pyattn.attention, *(x.requires_grad_() for x in qkv), dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_makes_the_checks(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    with pytest.raises(pyattn.DtypeError, match="value: expected query's dtype"):
        pyattn.explain(pyattn.attention, q, k, v.double())
    with pytest.raises(ValueError, match="explain: meta tensors are on no device .*FakeTensorMode"):
        pyattn.explain(pyattn.attention, *(x.to("meta") for x in (q, k, v)))
    with pytest.raises(TypeError, match="made no pyattn call"):
        pyattn.explain(torch.add, q, k)


def test_explain_leaves_no_trace(qkv: tuple[Tensor, ...]) -> None:
    pyattn.explain(pyattn.attention, *qkv)
    assert pyattn.attention(*qkv).shape == qkv[0].shape


def test_use_backend_is_obeyed_and_restored(qkv: tuple[Tensor, ...]) -> None:
    with pyattn.use_backend("reference"):
        answer = pyattn.explain(pyattn.attention, *qkv)
        assert (answer.backend, answer.memory) == ("reference", "O(q_len * kv_len)")
        assert "use_backend('reference') is in force" in answer.refusals["cpu"]
        with pyattn.use_backend("cpu"):
            assert pyattn.explain(pyattn.attention, *qkv).backend == "cpu"
        assert pyattn.explain(pyattn.attention, *qkv).backend == "reference"
    assert pyattn.explain(pyattn.attention, *qkv).backend == "cpu"


def test_a_requested_backend_that_cannot_run_is_an_error(qkv: tuple[Tensor, ...]) -> None:
    with pyattn.use_backend("triton"), pytest.raises(NotImplementedError) as error:
        pyattn.attention(*qkv)
    message = str(error.value)
    assert "q: torch.float32 (2, 4, 5, 8) on cpu" in message
    assert "triton: query is on cpu, not on a CUDA device" in message
    assert "cpu: use_backend('triton') is in force" in message


@pytest.mark.parametrize(
    ("capability", "reasons"), [((7, 5), ["cuda:1 is sm_75; the kernels need sm_80 or newer"]), ((8, 0), [])]
)
def test_triton_refuses_old_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reasons: list[str]
) -> None:
    on_gpu: Any = SimpleNamespace(q=SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)))
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert TritonAttention().refusals(on_gpu, AttentionConfig(1.0)) == reasons


def test_triton_refuses_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _dispatch._triton_missing.__wrapped__() == "torch is built for ROCm; the kernels are made for NVIDIA GPUs"


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of 'cpu', 'triton', 'torch', 'reference', got 'cuda'"):
        pyattn.use_backend("cuda")
    with pytest.raises(ValueError, match=r"got \['cpu'\]"):
        pyattn.use_backend(["cpu"])


def test_use_backend_does_not_cross_threads(qkv: tuple[Tensor, ...]) -> None:
    seen: list[str] = []
    with pyattn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(pyattn.explain(pyattn.attention, *qkv).backend))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_backward_uses_the_backend_of_its_forward(
    create_graph: bool, qkv: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, kernels in ATTENTION.kernels.items():
        original = kernels.backward
        monkeypatch.setattr(
            kernels,
            "backward",
            lambda *a, name=name, original=original, **k: (calls.append(name), original(*a, **k))[1],
        )
    q = qkv[0].requires_grad_()
    with pyattn.use_backend("reference"):
        out = pyattn.attention(*qkv)
    torch.autograd.grad(out.sum(), q, create_graph=create_graph)
    torch.autograd.grad(pyattn.attention(*qkv).sum(), q, create_graph=create_graph)
    assert calls == ["reference", "cpu"]


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    pyattn.show_config()
    text = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert rows["torch"].strip() == torch.__version__
    assert rows["isa"].strip().startswith(pyattn._C.isa())
    assert rows["threads"].strip() == str(torch.get_num_threads())
    assert rows["backend triton"].strip().startswith("available" if torch.cuda.is_available() else "missing: ")


def test_import_is_light() -> None:
    """Neither the compiler nor triton comes with the import, and a first eager call brings neither."""
    loaded = run_python(
        "import sys, torch; before = set(sys.modules)\n"
        "import pyattn; q = torch.randn(1, 1, 4, 8, requires_grad=True); pyattn.attention(q, q, q).sum().backward()\n"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules, 'numpy' in sys.modules)"
    )
    assert loaded.split()[:2] == ["False", "False"]


def test_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, pyattn; q = torch.randn(1, 1, 4, 8); pyattn.attention(q, q, q)\n"
        "print(pyattn.explain(pyattn.attention, q, q, q))"
    )
    assert "triton is not installed" in run_python(code)
