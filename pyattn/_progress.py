"""A progress bar on the terminal, and nothing where there is none."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate over `items`, drawing a bar on standard error if that is a terminal; it is wiped at the end."""
    if not sys.stderr.isatty():
        yield from items
        return
    next_drawing = 0.0
    try:
        for done, item in enumerate(items):
            if time.monotonic() >= next_drawing:
                filled = 30 * done // len(items)
                print(f"\r{label} [{'#' * filled:30}] {done}/{len(items)}", end="", file=sys.stderr, flush=True)
                next_drawing = time.monotonic() + 0.1
            yield item
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
