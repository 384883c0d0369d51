"""Every instruction set of this machine, each in a process of its own, and what keeps their object code apart."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyattn import _C

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
NOT_RUNNING = [isa for isa in _C.available_isas() if isa != _C.isa()]

# What malloc returns is filled with 0x7f, which is about 3e38 in float32 and NaN in float16: as torch's buffers are
# full of NaN under test, so scratch memory of the kernels that is read before it is written shows.
FILLED_MALLOC = {"MALLOC_PERTURB_": str(0xFF ^ 0x7F)}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", NOT_RUNNING)
def test_instruction_set(isa: str) -> None:
    """The kernels' tests on the other kernels; this process has run them on its own."""
    ops = ("attention", "masks", "losses", "linear_losses", "embedding", "lstm")
    files = [str(TESTS / f"test_{name}.py") for name in ops]
    options = ("-p", "no:cacheprovider", "--hypothesis-profile=isa", "--tb=short")
    result = python("-m", "pytest", *options, *files, PYATTN_ISA=isa, **FILLED_MALLOC)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr
    assert f"pyattn: instruction set {isa};" in result.stdout  # conftest.py asked the kernels


def test_the_best_runs_unless_another_is_forced() -> None:
    """`available_isas` is in order of preference, and ends with what runs anywhere."""
    available, compiled = _C.available_isas(), _C.compiled_isas()
    assert [isa for isa in compiled if isa in available] == available and available[-1] == "base"
    assert _C.isa() == (os.environ.get("PYATTN_ISA") or available[0])


@pytest.mark.parametrize("name", ["avx1024", *sorted(set(_C.compiled_isas()) - set(_C.available_isas()))])
def test_an_instruction_set_that_is_not_there_is_an_error(name: str) -> None:
    result = python("-c", "from pyattn import _C; _C.isa()", PYATTN_ISA=name)
    listed = f"compiled: {', '.join(_C.compiled_isas())}; available here: {', '.join(_C.available_isas())}"
    assert result.returncode != 0
    assert re.search(rf"RuntimeError: PYATTN_ISA={name} is not .*{re.escape(listed)}", result.stderr), result.stderr


# ---- object code -----------------------------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# GCC's pointer to the handler of exceptions: data, and the same from every compilation.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


@needs_nm
@needs_compiler
def test_kernels_define_no_weak_symbol(tmp_path: Path) -> None:
    """The linker keeps one copy of an inline function or template that several objects hold, maybe the one compiled
    for a processor that is not there. So the kernels, compiled once per instruction set, hold none; at -O1, what is
    trivial is inlined, as in every build, and what is not is seen."""
    kernel, widest = tmp_path / "kernel.o", ["-march=x86-64-v4"] if platform.machine() == "x86_64" else []
    flags = ["-std=c++17", "-O1", "-fopenmp", "-DPYATTN_VARIANT=probe", f"-I{CSRC}", *widest]
    subprocess.run(["c++", *flags, "-c", str(CSRC / "kernels.cpp"), "-o", str(kernel)], check=True)
    symbols = [line.split()[-2:] for line in subprocess.check_output(["nm", str(kernel)], text=True).splitlines()]
    assert len(symbols) > 10
    assert {name for kind, name in symbols if kind in "uVWvw"} <= HARMLESS


@needs_nm
@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP's symbol versions are glibc's")
def test_extension_asks_for_no_newer_openmp_than_torch_brings() -> None:
    """torch carries its own libgomp, which ends with GOMP_5.0: the extension would not load."""
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", _C.__file__], text=True)
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GOMP_([\d.]+)$", symbols, flags=re.MULTILINE)}
    assert versions and max(versions) < (5, 1)
