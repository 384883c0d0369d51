"""The kernels themselves, run by Triton's interpreter on CPU tensors.

`test_triton_ladder.py` starts this folder as a process of its own, since the choice between interpreter and compiler is
made when triton is imported. By hand: `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import os
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or "triton" in sys.modules:
    raise RuntimeError("run as: TRITON_INTERPRET=1 pytest tests/interpreter")

import repair
import sanitizer

repair.install()
sanitizer.install()


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns where a GPU does not: infinities meeting, maxima of rows that are all NaN.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:(numpy|triton|repair).*")
