"""Measures pyattn beside PyTorch: correctness first, then time.

    python benchmarks/run.py --quick                     about a minute
    python benchmarks/run.py --json FILE --plot FILE     the full grid
    python benchmarks/run.py --device cuda --json FILE   the same on a GPU, each of torch's backends forced

How a number is measured: timing.py, memory.py. What is measured: cases.py. What may be shown: gate.py.
"""

import argparse
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from cases import DIRECTIONS, DTYPES, MASKS, PYATTN, SUITES, TINY, Case, Route, Shape, variants
from gate import SEEDS, Error, check
from memory import Memory
from report import Failure, Progress, Results, Row, failure_text, header_text, plot, row_text, summary_text
from timing import BLOCKS, Stopwatch, interleave, peak_flops_per_s, stopwatch_for

import pyattn

# Seconds of timing per row. The quick run also pools fewer seeds in the gate.
FULL_SECONDS, QUICK_SECONDS, QUICK_SEEDS = 1.5, 0.3, 2


@dataclass(frozen=True)
class Bench:
    """How to measure a case."""

    device: str
    directions: Sequence[str]
    seconds: float
    seeds: int
    stopwatch: Stopwatch
    memory: Memory

    def measure(self, case: Case) -> list[Row] | Failure:
        """A row per direction; a failure if the gate refuses the case or a call raises, so that a long run goes on."""
        errors: list[Error] = []
        try:
            routes = case.routes(self.device)
            errors = check(case, routes[PYATTN], self.device, self.seeds)
            if all(error.passed for error in errors):
                routes = {name: route for name, route in routes.items() if self._runs(case, name, route)}
                return [
                    self._row(case, routes, direction) for direction in self.directions if direction in case.directions
                ]
            reason = "the error is above the limit"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return Failure(case.op, case.dtype, case.mask, case.shape, reason, errors)

    def _runs(self, case: Case, name: str, route: Route) -> bool:
        """Whether a route takes the problem: a forced backend of torch's may refuse it, with a RuntimeError."""
        if name in (PYATTN, case.yardstick) or self.device == "cpu":
            return True
        try:
            step = variants(case, {name: route}, case.directions[-1], self.device)[name]
            with step.context(), warnings.catch_warnings(action="ignore"):
                step.call()
        except RuntimeError:
            return False
        return True

    def _row(self, case: Case, routes: dict[str, Route], direction: str) -> Row:
        timings = interleave(variants(case, routes, direction, self.device), self.stopwatch, self.seconds)
        memory = {name: self.memory.extra_peak_bytes(case, name, direction) for name in routes}
        work = case.flops(direction), case.bytes(direction)
        return Row(case.op, direction, case.dtype, case.mask, case.shape, *work, timings, memory)


def header(args: argparse.Namespace, clock: str, seeds: int) -> dict[str, str]:
    x = torch.zeros(TINY, device=args.device)
    explanation = pyattn.explain(pyattn.attention, x, x, x)
    return {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name(),
        "backend": f"{explanation.backend}, {explanation.isa}",
        "threads": str(torch.get_num_threads()),
        "clock": f"{clock}, {BLOCKS} interleaved blocks, {args.seconds:g} s per row; gate on {seeds} seeds",
        "pyattn": f"pyattn {version('pyattn')}, commit {_commit()}",
        "torch": f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split(","))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="attention")
    parser.add_argument("--op", help="only this op of the suite")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--mask", nargs="+", choices=MASKS)
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="B,H,S,D", help="(or B,H,L,S,D) instead of the grid's"
    )
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch and pyattn alike (default 1)")
    parser.add_argument("--seconds", type=float, help="of timing per row")
    parser.add_argument("--quick", action="store_true", help="a small grid, in about a minute")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="measure it (default: unless --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else FULL_SECONDS
    if args.memory is None:
        args.memory = not args.quick
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed: pip install 'pyattn[bench]'")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if a case failed."""
    args = parse(argv)
    cases = SUITES[args.suite](args.shapes, args.dtype, args.mask, args.quick)
    cases = [case for case in cases if args.op in (None, case.op)]
    if args.list:
        print("\n".join(f"{case.op:<21} {case.dtype:<5} {case.mask:<8} {case.shape}" for case in cases))
        return 0

    torch.set_num_threads(args.threads)
    results = run(args, cases)
    print(summary_text(results))
    if args.json:
        results.write(args.json)
    if args.plot:
        plot(results, args.plot)
    return 1 if results.failures else 0


def run(args: argparse.Namespace, cases: Sequence[Case]) -> Results:
    """Measures and shows case by case. An interrupt (control-C) ends it with what there is."""
    clock, stopwatch = stopwatch_for(args.device, args.threads)
    seeds = QUICK_SEEDS if args.quick else SEEDS
    peaks = peak_flops_per_s({case.dtype: DTYPES[case.dtype] for case in cases}, args.device, stopwatch)
    results = Results(header(args, clock, seeds), {dtype: peak / 1e9 for dtype, peak in peaks.items()})
    progress = Progress(len(cases))
    progress.print(header_text(results))
    with Memory(args.device, args.threads, args.memory) as memory, suppress(KeyboardInterrupt):
        bench = Bench(args.device, args.direction, args.seconds, seeds, stopwatch, memory)
        for number, case in enumerate(cases):
            progress.update(number, f"{case.op} {case.dtype} {case.mask} {case.shape}")
            measured = bench.measure(case)
            if isinstance(measured, Failure):
                results.failures.append(measured)
                progress.print(failure_text(measured))
            else:
                results.rows += measured
                progress.print("\n".join(row_text(row, results) for row in measured))
    return results


if __name__ == "__main__":
    sys.exit(main())
