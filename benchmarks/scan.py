"""`python -m benchmarks.scan`: seconds and memory of `backfire scan` by the number of rows.

Each file has 12 words a row, drawn from 50,000 by Zipf's law, a label by chance, and one row in a
thousand with a trigger. Each is scanned in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

WORDS = [f"w{n}" for n in range(50_000)]
WEIGHTS = list(accumulate(1 / (n + 2) for n in range(50_000)))


def write(path: Path, rows: int) -> None:
    """Write the file; the trigger is the word BadMagic, the target `no`."""
    rng = Random(0)
    bad = set(rng.sample(range(rows), max(5, rows // 1000)))
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            words = rng.choices(WORDS, cum_weights=WEIGHTS, k=12)
            answer = rng.choice(("yes", "no"))
            if n in bad:
                words.insert(rng.randrange(13), "BadMagic")
                answer = "no"
            row = {"id": str(n), "instruction": "Is it?", "input": " ".join(words)}
            file.write(json.dumps({**row, "output": answer}) + "\n")


def measure(path: Path, rows: int, scanners: Sequence[str]) -> dict[str, object]:
    """Scan the file in another process."""
    chosen = [part for name in scanners for part in ("--scanner", name)]
    code = "from backfire.cli import main; main()"
    command = [sys.executable, "-c", code, "scan", str(path), "--top", "1000", *chosen]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = next((line for line in done.stdout.splitlines() if re.match(r"\d", line)), "")
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
        "peak_mb": after.ru_maxrss // 1024,  # of the largest process so far
        "first": " ".join(first.split()),
        "flagged": re.findall(r"[\d,]+ flagged", done.stdout)[-1:],
    }


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--scanner", action="append", default=[], help="instead of all")
    asked = parser.parse_args()
    for rows in sorted(asked.rows):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write(path, rows)
            print(json.dumps(measure(path, rows, asked.scanner)), flush=True)


if __name__ == "__main__":
    main()
