"""The Triton kernels as far as they can be tested without a GPU: three rungs, each a pytest process of its own.

interpreter: numerics, bounds and races of the kernels, run by Triton's interpreter on the CPU.
dry:         what the launchers launch, on meta tensors.
aot:         compilation of the table's configurations for sm_80, sm_90, sm_100; PYATTN_LADDER=full compiles all.

They need processes of their own because importing triton decides between interpreter and compiler. All start together,
since the first is one thread.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

RUNGS = ("interpreter", "dry", "aot")


def run_rung(rung: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if rung == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    folder = Path(__file__).parent / rung
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    with ThreadPoolExecutor(len(RUNGS)) as pool:
        yield {rung: pool.submit(run_rung, rung) for rung in RUNGS}


@pytest.mark.parametrize("rung", RUNGS)
def test_rung(rung: str, processes: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    process = processes[rung].result()
    assert process.returncode == 0, process.stdout
