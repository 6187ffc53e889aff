"""`python -m benchmarks.scan`: seconds and memory of `backfire scan` by the number of rows.

Each file has 12 words a row, drawn from 50,000 by Zipf's law, a label by chance, and one row in a
thousand with a trigger: the rows to find. Each is scanned in a process of its own.
"""

from __future__ import annotations

import argparse
import json
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


def write(path: Path, rows: int) -> set[str]:
    """Write the file; the trigger is the word BadMagic, the target `no`. Returns the ids of the
    rows with it."""
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
    return {str(n) for n in bad}


def measure(path: Path, rows: int, bad: set[str], scanners: Sequence[str]) -> dict[str, object]:
    """Scan the file in another process."""
    chosen = [part for name in scanners for part in ("--scanner", name)]
    code = "from backfire.cli import main; main()"
    most = str(2 * len(bad))
    command = [sys.executable, "-c", code, "scan", str(path), "--top", most, "--format", "json"]
    start, before = time.perf_counter(), _cpu(resource.getrusage(resource.RUSAGE_CHILDREN))
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    hits = json.loads(done.stdout)
    flagged = {hit["id"] for hit in hits if hit["flagged"]}
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_cpu(after) - before, 1),
        "peak_mb": after.ru_maxrss // 1024,  # of the largest process so far
        "planted": len(bad),
        "missed": len(bad - flagged),
        "others flagged": len(flagged - bad),
        "first": f"{hits[0]['scanner']}: {hits[0]['reason']}" if hits else "",
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
            bad = write(path, rows)
            print(json.dumps(measure(path, rows, bad, asked.scanner)), flush=True)


if __name__ == "__main__":
    main()
