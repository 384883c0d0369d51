"""Extra peak memory of one call: how far the process grows beyond its inputs, outputs and gradients included.

On a CPU torch has no counter, so the operating system is asked. Each call runs in a process of its own, forked from a
clean server that has imported everything and started no threads (fork and OpenMP do not mix). There the high-water
mark of the resident set is reset, the call is made once, and the mark is read. What is done so that it means something:

- the same op runs first on the smallest problem: code pages and the thread pool are not the call's memory;
- the allocator is told to map every block from `MAP_FROM` bytes on and to unmap it when freed, so no memory freed
  earlier can be reused unseen;
- huge pages are off, so the mark moves in pages of 4 KB.

Scratch that a library keeps between calls counts: it is the process's first call of that size. The kernel counts
resident pages in batches per thread, so differences below `RESOLUTION` are not told apart.
"""

import ctypes
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Self

import torch
from cases import Case, variants
from timing import Variant

MAP_FROM = 16 * 1024
RESOLUTION = 1 << 20

# From <malloc.h> and <sys/prctl.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, PR_SET_THP_DISABLE = -1, -3, 41


class Memory:
    """Measures in child processes, one per call. `None` where the machine cannot tell, or nobody wants to know."""

    def __init__(self, device: str, threads: int, wanted: bool = True) -> None:
        self.device, self.threads, self.wanted = device, threads, wanted
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.wanted and self.device == "cpu" and sys.platform == "linux":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "pyattn"])
            self.pool = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def extra_peak_bytes(self, case: Case, route: str, direction: str) -> int | None:
        if self.wanted and self.device == "cuda":
            return _cuda_peak_bytes(case, route, direction)
        if self.pool is None:
            return None
        return self.pool.submit(_cpu_peak_bytes, case, route, direction, self.threads).result()


def _cuda_peak_bytes(case: Case, route: str, direction: str) -> int:
    step = _step(case, route, direction, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with step.context():
        step.call()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak_bytes(case: Case, route: str, direction: str, threads: int) -> int:
    """Runs in the child."""
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAP_FROM)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

    warm_up, step = (_step(problem, route, direction, "cpu") for problem in (case.smallest(), case))
    with step.context():
        warm_up.call()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
        before = _status_bytes("VmRSS")
        step.call()
    return max(0, _status_bytes("VmHWM") - before)


def _step(case: Case, route: str, direction: str, device: str) -> Variant:
    return variants(case, {route: case.routes(device)[route]}, direction, device)[route]


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
