"""How does a benchmark say what it measured, where, and with what? One JSON per script."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.environment import environment as machine

GIB = 2**30


@dataclass
class Record:
    """The result of one script.

    Attributes:
        name: Of the file, without its ending.
        settings: What was asked.
        rows: One dict per measured thing, each with the error of what was timed.
        bars: The figures of the bars, by id.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: dict[str, float] = field(default_factory=dict)

    def row(self, what: str, **values: Any) -> None:
        """Adds a row and shows it on stderr."""
        self.rows.append({"what": what, **values})
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
        )
        print(f"{what}: {shown}", file=sys.stderr, flush=True)

    def write(self, folder: Path) -> Path:
        """Writes `<folder>/<name>.json` and prints the bars."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(
            json.dumps(
                {
                    "name": self.name,
                    "bars": self.bars,
                    "environment": environment(),
                    "settings": self.settings,
                    "rows": self.rows,
                },
                indent=1,
            )
            + "\n"
        )
        for bar, value in self.bars.items():
            print(f"{bar:36} {value:.4g}")
        return path


def keep(record: Record, earlier: dict[str, Any]) -> None:
    """Puts the rows of an earlier record before those of this run; they say of which commit they are."""
    fresh = {row["what"] for row in record.rows}
    of = {"commit": earlier["environment"]["commit"]}
    record.rows[:0] = [of | row for row in earlier["rows"] if row["what"] not in fresh]
    record.settings["onto"] = earlier["settings"]


def environment() -> dict[str, Any]:
    """Commit, versions, card and host."""
    return {"commit": os.environ.get("OFFLOAD_COMMIT") or _commit(), **machine()}


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    status = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() + (" with changes" if status.stdout.strip() else "")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every script takes: --smoke and --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a small size, on the CPU too")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON; benchmarks/, or a temporary one with --smoke"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; a smoke run never lands on checked-in results unless it is told to."""
    args = parser.parse_args()
    if args.out is None:
        args.out = Path(tempfile.mkdtemp()) if args.smoke else Path("benchmarks")
    return args


def synchronize() -> None:
    """Waits for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Wall clock of one call, device work included."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall clock after one warm-up call."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


class PeakMemory:
    """The largest number of device bytes in use, as the driver counts it, read every 5 ms.

    Between two readings memory can rise and fall unseen; torch's own peak of reserved bytes, which misses
    nothing, is taken too, and the larger of both counts (context and other holders added to it).

    Attributes:
        nbytes: So far; 0 without a card.
        resting: Set while steps are timed: a reading holds up their launches. One is taken at the end.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.resting = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            free, total = torch.cuda.mem_get_info()
            self._others = total - free - torch.cuda.memory_reserved()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if torch.cuda.is_available():
            self._stop.set()
            self._thread.join()
            self._read()
            self.nbytes = max(self.nbytes, self._others + torch.cuda.max_memory_reserved())

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            if not self.resting:
                self._read()

    def _read(self) -> None:
        free, total = torch.cuda.mem_get_info()
        self.nbytes = max(self.nbytes, total - free)
