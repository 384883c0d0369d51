"""How one number is measured.

Variants of one computation are timed in one process, block by block and in alternating order, so that drift of the
clock frequency and the load of other processes fall on all of them alike:

    warm up and calibrate each     block 0: a b c     block 1: c b a     block 2: a b c     ...

A block holds samples; a sample is a batch of calls that lasts at least `SAMPLE_S`. Ratios are taken between the minima
over all blocks: what disturbs a run only ever adds time. Median and interquartile range tell how much it did.
Inputs stay where the last call left them, so caches are warm, as they are in a model that has just computed q, k and v.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

BLOCKS = 7

# A reading of the thread clock is a system call of about 0.3 us: 0.03 % of a sample.
SAMPLE_S = 1e-3

# The first call of a block finds the caches full of the previous variant's data and is thrown away, unless it lasts so
# long that refilling them (32 MB at 10 GB/s: 3 ms) is a small part of it.
LONG_CALL_S = 0.1

# A variant this many times slower than the second fastest can decide no ratio: its calibration is its figure.
# (Of our variant and its rivals, the fastest rival is always among the two fastest, so it is never left out.)
HOPELESS = 4.0

PEAK_SECONDS = 0.2  # for one size of torch.mm

Stopwatch = Callable[[Callable[[], object], int], float]  # (call, n) -> seconds that n calls took


@dataclass(frozen=True)
class Variant:
    """One way to compute the thing; `context` is entered around every batch of calls, outside the measured time."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the statistics of all samples, and the minimum of each block."""

    min_s: float
    median_s: float
    spread: float  # interquartile range / median
    block_minima_s: list[float]

    @classmethod
    def of(cls, blocks: list[list[float]]) -> "Timing":
        samples = sorted(sample for block in blocks for sample in block)
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
        return cls(samples[0], median, (quartiles[2] - quartiles[0]) / median, [min(block) for block in blocks])


def cpu_stopwatch(clock: Callable[[], float]) -> Stopwatch:
    def elapsed_s(call: Callable[[], object], n: int) -> float:
        start = clock()
        for _ in range(n):
            call()
        return clock() - start

    return elapsed_s


def cuda_stopwatch() -> Stopwatch:
    """Device time between two events; it includes the gaps between launches, which a user waits for as well."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def elapsed_s(call: Callable[[], object], n: int) -> float:
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return elapsed_s


def stopwatch_for(device: str, threads: int) -> tuple[str, Stopwatch]:
    """The clock's name and the stopwatch. One thread: its own CPU time, which other processes on the machine cannot
    lengthen (autograd runs a CPU backward in the calling thread). More threads: wall time, as only that counts waiting.
    """
    if device == "cuda":
        return "CUDA events", cuda_stopwatch()
    if threads == 1:
        return "thread CPU time", cpu_stopwatch(time.thread_time)
    return "wall time", cpu_stopwatch(time.perf_counter)


def interleave(
    variants: Mapping[str, Variant], stopwatch: Stopwatch, budget_s: float, blocks: int = BLOCKS
) -> dict[str, Timing]:
    """Times all variants in about `budget_s` seconds, or in as long as one sample per block takes."""
    with _no_garbage_collection():
        plans = {name: _calibrate(variant, stopwatch) for name, variant in variants.items()}
        limit_s = HOPELESS * sorted(plan.call_s for plan in plans.values())[:2][-1]
        racing = [name for name, plan in plans.items() if plan.call_s <= limit_s]
        block_s = budget_s / blocks / len(racing)

        measured: dict[str, list[list[float]]] = {name: [] for name in racing}
        for block in range(blocks):
            for name in racing if block % 2 == 0 else reversed(racing):
                measured[name].append(_block(variants[name], stopwatch, plans[name], block_s))
    return {name: Timing.of(measured.get(name, [[plan.call_s]])) for name, plan in plans.items()}


@dataclass(frozen=True)
class _Plan:
    calls: int  # in one sample
    sample_s: float

    @property
    def call_s(self) -> float:
        return self.sample_s / self.calls


def _calibrate(variant: Variant, stopwatch: Stopwatch) -> _Plan:
    """The very first call is not counted: it loads code, fills caches and may compile."""

    def least_s(calls: int) -> float:
        elapsed_s = stopwatch(variant.call, calls)
        # One hiccup must not make a call look slow, or even hopeless; a long one is not that much of a hiccup.
        return elapsed_s if elapsed_s > LONG_CALL_S else min(elapsed_s, stopwatch(variant.call, calls))

    with variant.context():
        stopwatch(variant.call, 1)
        calls = 1
        while (sample_s := least_s(calls)) < SAMPLE_S:
            calls *= 2
    return _Plan(calls, sample_s)


def _block(variant: Variant, stopwatch: Stopwatch, plan: _Plan, block_s: float) -> list[float]:
    """Seconds per call of as many samples as fit into the block, at least one."""
    with variant.context():
        if plan.call_s < LONG_CALL_S:
            stopwatch(variant.call, 1)
        samples = max(1, int(block_s / plan.sample_s))
        return [stopwatch(variant.call, plan.calls) / plan.calls for _ in range(samples)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Square products, small first: the search ends when a larger one is slower (out of cache, or no fast kernel at all).
CPU_SIZES, CUDA_SIZES = (256, 512, 1024, 2048), (2048, 4096, 8192)


def peak_flops_per_s(dtypes: Mapping[str, torch.dtype], device: str, stopwatch: Stopwatch) -> dict[str, float]:
    """The machine's peak as it can be had: the best rate of torch.mm, with the threads in force.

    A kernel may compute in fp32 what it reads in a half type, so a half type's peak is at least fp32's: on a CPU
    without bf16 or fp16 instructions torch.mm in them is 50 times slower.
    """
    rates = {dtype: _mm_flops_per_s(dtype, device, stopwatch) for dtype in {torch.float32, *dtypes.values()}}
    return {
        name: max(rates[dtype], rates[torch.float32] if dtype.itemsize < torch.float32.itemsize else 0.0)
        for name, dtype in dtypes.items()
    }


def _mm_flops_per_s(dtype: torch.dtype, device: str, stopwatch: Stopwatch) -> float:
    best = 0.0
    for n in CUDA_SIZES if device == "cuda" else CPU_SIZES:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        product = Variant(partial(torch.mm, a, b))
        timing = interleave({"mm": product}, stopwatch, PEAK_SECONDS)["mm"]
        rate = 2 * n**3 / timing.min_s
        if rate < best:
            break
        best = rate
    return best
