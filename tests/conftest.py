"""What every test runs under: warnings as errors (pyproject.toml), one thread, and buffers full of NaN.

Hypothesis profiles: "default" is fixed, for a plain `pytest` and CI; "isa" is a smaller one for each further
instruction set (test_isa.py); "large" draws anew each time: `pytest --hypothesis-profile=large`.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import pyattn._C

# No deadline anywhere: the machine's load would decide. No explain phase: it reruns a failure hundreds of times.
COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
}
FIXED = {"derandomize": True, "database": None}
settings.register_profile("default", max_examples=100, **FIXED, **COMMON)
settings.register_profile("isa", max_examples=40, **FIXED, **COMMON)
settings.register_profile("large", max_examples=5000, **COMMON)
settings.load_profile("default")

# One thread, because two that spin for each other's tiny operations are five times slower on a loaded machine; tests of
# threading set more. The results are the same bits.
THREADS = 1


def pytest_report_header() -> str:
    return f"pyattn: instruction set {pyattn._C.isa()}; torch {torch.__version__}, {THREADS} thread"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def buffers_of_nan() -> Iterator[None]:
    """Deterministic mode fills what torch.empty and its kin return with NaN, so an element that a kernel leaves
    unwritten is seen, wherever its buffer was allocated."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
