"""`python -m tests.torture`: rows of the reliability table at their full counts, or at others.

python -m tests.torture                      # every row, as `make torture` does
python -m tests.torture disk-full cell-kills # some rows
python -m tests.torture --share 0.1          # every row at a tenth of its count
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows one after the other; returns how many miss their target."""
    from hypothesis import HealthCheck, settings

    from tests.helpers.tiny import write_tiny_model, write_tiny_tokenizer
    from tests.torture import page
    from tests.torture.row import Ground
    from tests.torture.rows import ROWS

    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of: {', '.join(ROWS)}")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full count")
    options = parser.parse_args(argv)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile(
        "torture", derandomize=True, deadline=None, database=None, suppress_health_check=health
    )
    settings.load_profile("torture")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        place = Path(folder)
        os.environ["BACKFIRE_CACHE"] = str(place / "cache")
        tiny = write_tiny_model(write_tiny_tokenizer(place / "tokenizer"), place / "tiny")
        for name in options.rows or ROWS:
            (place / name).mkdir()
            count = max(1, round(ROWS[name].full * options.share))
            entry = measured(name, count, Ground(place / name, tiny))
            page.record(name, entry)
            failed += bool(entry.get("missed"))
    return failed


def measured(name: str, count: int, ground: Any) -> dict[str, Any]:
    """Run one row and print its figures; returns its entry of the JSON file."""
    from tests.torture.row import NotHere
    from tests.torture.rows import ROWS

    row, start = ROWS[name], time.monotonic()
    try:
        figures = dict(row.measure(count, ground))
    except NotHere as lacking:
        print(f"{name}: not run: {lacking}", flush=True)
        return {"why": str(lacking)}
    seconds = time.monotonic() - start
    missed = row.missed(figures)
    print(f"{name}: {count} in {seconds:.0f} s: {figures} {missed or ''}", flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    entry = {"count": count, "when": when, "seconds": round(seconds, 1), "machine": machine}
    return {**entry, "figures": figures, "missed": missed}


if __name__ == "__main__":
    sys.exit(main())
