"""What the reader sees: the table, the summary, the picture; and the JSON that all of them can be made from again.

python benchmarks/report.py RESULTS.json [--plot PICTURE.png]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import DIRECTIONS, FORWARD, MASKS, PYATTN, TINY, TRAINING
from gate import Error
from memory import RESOLUTION
from timing import Timing

SCHEMA = 1

# Ratios of minima repeat within about 3 %: from here to 1 two routes are called even.
EVEN = 0.97
WORST_ROWS = 5


@dataclass(frozen=True)
class Row:
    """One case in one direction; the timings are those of pyattn and of torch's routes."""

    op: str
    direction: str
    dtype: str
    mask: str
    shape: tuple[int, ...]
    flops: int
    bytes: int
    timings: dict[str, Timing]
    extra_peak_bytes: dict[str, int | None]

    def ratio(self, route: str) -> float:
        """How many times faster than the route pyattn is, by the minima."""
        return self.timings[route].min_s / self.timings[PYATTN].min_s

    @property
    def fastest(self) -> str:
        """The fastest of torch's routes."""
        return min(self.timings.keys() - {PYATTN}, key=lambda route: self.timings[route].min_s)

    @property
    def speedup(self) -> float:
        """The ratio that counts: to the fastest of torch's routes."""
        return self.ratio(self.fastest)

    @property
    def gflops_per_s(self) -> float:
        return self.flops / self.timings[PYATTN].median_s / 1e9


@dataclass(frozen=True)
class Failure:
    """A case without times: what the gate found, or the exception that a route raised."""

    op: str
    dtype: str
    mask: str
    shape: tuple[int, ...]
    reason: str
    errors: list[Error]


@dataclass
class Results:
    header: dict[str, Any]
    peak_gflops_per_s: dict[str, float]  # by dtype
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def peak_share(self, row: Row) -> float:
        return row.gflops_per_s / self.peak_gflops_per_s[row.dtype]

    def write(self, path: Path) -> None:
        document = {"schema": SCHEMA, **asdict(self)}
        for row, entry in zip(self.rows, document["rows"], strict=True):  # derived, for whoever reads the file alone
            entry |= {"fastest": row.fastest, "speedup": row.speedup, "gflops_per_s": row.gflops_per_s}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"{path}: expected schema {SCHEMA}, got {document['schema']}")
        rows = [_load(Row, r, timings={n: Timing(**t) for n, t in r["timings"].items()}) for r in document["rows"]]
        failures = [_load(Failure, f, errors=[Error(**e) for e in f["errors"]]) for f in document["failures"]]
        return cls(document["header"], document["peak_gflops_per_s"], rows, failures)


def _load(kind: type, entry: dict[str, Any], **converted: Any) -> Any:
    known = {name: entry[name] for name in kind.__dataclass_fields__}
    return kind(**known | {"shape": tuple(entry["shape"])} | converted)


SHORT = {FORWARD: "fwd", TRAINING: "fwd+bwd"}

COLUMNS = (
    f"{'op':<22}{'dir':<8}{'dtype':<6}{'mask':<8}{'B,H,S,D':<15}{'median':>8}{'spread':>7}{'GFLOP/s':>8}{'peak':>5}"
    f"{'sdpa':>8}{'formula':>8}{'fastest':>8} {'which':<8}{'MiB':>5}{'torch':>6}"
)

LEGEND = """\
median, spread (interquartile range), GFLOP/s: pyattn's; only (query, key) pairs that see each other count as work.
peak: share of torch.mm's best rate here (half types: of fp32's if that is higher).
sdpa, formula, fastest: how many times faster pyattn is, by the minima, than F.scaled_dot_product_attention, than the
eager formula, and than the faster torch route, named under "which"; ~ is from a single sample.
MiB, torch: extra peak memory of one call, outputs included, pyattn's and that torch route's."""


def header_text(results: Results) -> str:
    peaks = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in results.peak_gflops_per_s.items())
    lines = {**results.header, "torch.mm GFLOP/s": peaks}
    width = max(map(len, lines))
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines.items()), "", LEGEND, "", COLUMNS])


def row_text(row: Row, results: Results) -> str:
    timing, fastest = row.timings[PYATTN], row.fastest
    ratios = "".join(f"{_ratio_text(row, route):>8}" for route in ("sdpa", "formula", fastest))
    mib, torch_mib = (_mib_text(row.extra_peak_bytes.get(route)) for route in (PYATTN, fastest))
    return (
        f"{row.op:<22}{SHORT[row.direction]:<8}{row.dtype:<6}{row.mask:<8}{_shape_text(row.shape):<15}"
        f"{_time_text(timing.median_s):>8}{timing.spread:>7.0%}{row.gflops_per_s:>8.1f}{results.peak_share(row):>5.0%}"
        f"{ratios} {fastest:<8}{mib:>5}{torch_mib:>6} {_verdict(row.speedup)}"
    ).rstrip()


def failure_text(failure: Failure) -> str:
    case = f"{failure.op:<22}{'':<8}{failure.dtype:<6}{failure.mask:<8}{_shape_text(failure.shape):<15}"
    lines = [f"{case} NO TIME: {failure.reason}"]
    for e in failure.errors:
        verdict = "passed" if e.passed else "FAILED"
        lines.append(f"    {e.result:<4}{verdict}: error {e.pyattn:.3g}, torch's {e.torch:.3g}, limit {e.limit:.3g}")
    return "\n".join(lines)


def summary_text(results: Results) -> str:
    """Geometric means of the ratio that counts, the cost of a call, and the rows where pyattn does worst."""
    grid = [row for row in results.rows if row.shape != TINY]
    lines = ["", f"{'geometric mean':<24}" + "".join(f"{name:>9}" for name in (*MASKS, "all", "worst"))]
    for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in grid):
        group = [row for row in grid if (row.dtype, row.direction) == (dtype, direction)]
        cells = [_mean_text([row for row in group if row.mask == mask]) for mask in MASKS]
        cells += [_mean_text(group), f"{min(row.speedup for row in group):.2f}x"]
        lines.append(f"{dtype:<6}{direction:<18}" + "".join(f"{cell:>9}" for cell in cells))
    lines.append("")
    for row in results.rows:
        if row.shape == TINY:
            costs = ", ".join(f"{route} {timing.min_s * 1e6:.2f}" for route, timing in row.timings.items())
            lines.append(f"cost of a call in us, {row.dtype} {_shape_text(row.shape)} {row.direction}: {costs}")
    slower, even = (sum(_verdict(row.speedup) == word for row in results.rows) for word in ("slower", "even"))
    lines.append(f"{len(results.rows)} rows: {slower} slower than torch's faster route, {even} even ({EVEN} to 1)")
    lines.append(f"cases without a time, for their gate or an error: {len(results.failures)}")
    worst = sorted(results.rows, key=lambda row: row.speedup)[:WORST_ROWS]
    return "\n".join([*lines, "worst rows:", *(row_text(row, results) for row in worst)])


def _mean_text(rows: Sequence[Row]) -> str:
    return f"{statistics.geometric_mean(row.speedup for row in rows):.2f}x" if rows else "-"


def _ratio_text(row: Row, route: str) -> str:
    if route not in row.timings:
        return "-"
    ratio, once = row.ratio(route), len(row.timings[route].block_minima_s) == 1
    return f"{'~' if once else ''}{ratio:.{2 if ratio < 10 else 0}f}x"


def _time_text(seconds: float) -> str:
    unit, factor = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    return f"{seconds * factor:.3g} {unit}"


def _mib_text(size: int | None) -> str:
    if size is None:
        return "-"
    return "<1" if size < RESOLUTION else f"{size / 2**20:.0f}"


def _shape_text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def _verdict(ratio: float) -> str:
    return "slower" if ratio < EVEN else "even" if ratio < 1 else ""


class Progress:
    """A bar on a terminal's last line; where standard error is no terminal, nothing."""

    WIDTH = 24

    def __init__(self, total: int) -> None:
        self.total, self.start = total, time.monotonic()
        self.shown = sys.stderr.isatty()

    def update(self, done: int, doing: str) -> None:
        if self.shown:
            filled = self.WIDTH * done // self.total
            elapsed = time.strftime("%M:%S", time.gmtime(time.monotonic() - self.start))
            bar = "#" * filled + "." * (self.WIDTH - filled)
            print(f"\r\033[K[{bar}] {done}/{self.total} {elapsed} {doing}", end="", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(text, flush=True)


# Okabe and Ito's palette keeps the series apart for every kind of colour vision; the markers do so in print.
SERIES = {"full": ("#0072B2", "o"), "causal": ("#D55E00", "s"), "padding": ("#009E73", "^")}


def plot(results: Results, path: Path) -> None:
    """One panel per dtype and direction: how many times faster pyattn is than torch's faster route, by shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # float64 is measured at two shapes: the table says it better.
    rows = [row for row in results.rows if row.shape != TINY and row.dtype != "fp64"]
    if not rows:
        sys.exit(f"--plot: nothing to draw: the picture leaves out fp64 and {TINY}, and nothing else was measured")
    dtypes, shapes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("dtype", "shape"))
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    figure, panels = plt.subplots(
        len(dtypes),
        len(directions),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
        figsize=(1 + max(4.5, 1.8 + 0.28 * len(shapes)) * len(directions), 2.2 + 1.9 * len(dtypes)),
    )
    for dtype, line in zip(dtypes, panels, strict=True):
        of_dtype = [row for row in rows if row.dtype == dtype]
        ratios = [row.speedup for row in of_dtype]
        line[0].set_ylim(min(0.7, 0.8 * min(ratios)), max(2.2, 1.3 * max(ratios)))
        for direction, panel in zip(directions, line, strict=True):
            group = [row for row in of_dtype if row.direction == direction]
            _panel(panel, group, shapes)
            panel.set_title(f"{dtype} {direction}", loc="left", fontsize=10, weight="bold")
            panel.set_title(f"geometric mean {_mean_text(group)}", loc="right", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("batch, heads, length, head_dim", fontsize=9)
    figure.supylabel("times faster than torch's faster route", fontsize=10)
    facts = [results.header[name] for name in ("machine", "backend", "torch")]
    facts.append(f"threads: {results.header['threads']}")
    figure.suptitle(f"pyattn beside the faster of torch's SDPA and the eager formula\n{', '.join(facts)}", fontsize=11)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(panel: Any, rows: Sequence[Row], shapes: Sequence[tuple[int, ...]]) -> None:
    """Ratios over shapes on a logarithmic axis, so that twice as fast and half as fast look alike."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_locator(LogLocator(base=2))
    panel.yaxis.set_major_formatter("{x:g}x")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)

    panel.axhspan(panel.get_ylim()[0], 1, color="black", alpha=0.06, linewidth=0)
    panel.axhline(1, color="black", linewidth=1.2, label="torch")
    for offset, mask in enumerate(MASKS, start=-1):
        series = [row for row in rows if row.mask == mask]
        color, marker = SERIES[mask]
        x = [shapes.index(row.shape) + 0.18 * offset for row in series]
        ratios = [row.speedup for row in series]
        panel.vlines(x, 1, ratios, color=color, linewidth=1, alpha=0.5)
        panel.plot(x, ratios, marker, color=color, markersize=5, label=mask)
    panel.set_xticks(range(len(shapes)), [_shape_text(shape) for shape in shapes], rotation=90, fontsize=8)
    panel.set_xlim(-0.6, len(shapes) - 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print stored results, or draw them.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results = Results.read(args.results)
    if args.plot:
        plot(results, args.plot)
        return
    texts = [header_text(results), *(row_text(row, results) for row in results.rows)]
    print("\n".join([*texts, *map(failure_text, results.failures), summary_text(results)]))


if __name__ == "__main__":
    main()
