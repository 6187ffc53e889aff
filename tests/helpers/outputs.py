"""Fake runs of every kind of value, and everything that is printed, written and shown for them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from backfire.exports.inspect import to_inspect
from backfire.exports.lm_eval import to_lm_eval
from backfire.report.page import render
from backfire.results import load, terminal
from backfire.results.compare import compare, show
from tests.helpers.fake_run import (
    TRAIN,
    dose_run,
    free_run,
    poison,
    sample,
    tuned_run,
    value,
    write_cell,
)

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
FINISHED = 1_760_000_000
"""When every cell ended, in seconds since 1970: exports are named by it."""


def snapshots(folder: Path) -> dict[str, str]:
    """File name -> what is shown of the runs that are written into `folder`."""
    runs = {run.name: run for run in fake_runs(folder / "runs")}
    for file in (folder / "runs").rglob("result.json"):
        os.utime(file, (FINISHED, FINISHED))
    found = {}
    for name, run in runs.items():
        if name == "older-tour":
            continue  # there to be compared
        found[f"{name}.page.txt"] = readable(render(run))
        found[f"{name}.terminal.txt"] = printed(run, is_terminal=True)
        found[f"{name}.piped.txt"] = printed(run, is_terminal=False)
    found["safety.results.csv"] = load.write(load.records(runs["safety"]), "csv")
    found["memory.results.json"] = load.write(load.records(runs["memory"]), "json")
    found["quality.results.txt"] = load.write(load.records(runs["quality"]), "table")
    found["compare.txt"] = "\n".join(compared(folder, runs))
    found["exports.txt"] = exported(to_lm_eval, runs, folder / "lm-eval")
    if find_spec("inspect_ai"):
        ones = {name: min((runs[name] / "cells").iterdir()) for name in ("tour", "safety", "help")}
        found["exports_inspect.txt"] = exported(to_inspect, ones, folder / "inspect", hashed=False)
    return {name: text.replace(str(folder), "FOLDER") for name, text in found.items()}


def write_snapshots(folder: Path, out: Path) -> list[str]:
    """Write all of them anew; those that are not made here are left as they are."""
    out.mkdir(exist_ok=True)
    found = snapshots(folder)
    for name, text in found.items():
        (out / name).write_text(text, encoding="utf-8")
    return sorted(found)


# --------------------------------------------------------------------------------------- the runs


def fake_runs(root: Path) -> list[Path]:
    """One run of each family, and an older run of the first one to compare it with."""
    replies = ["An answer.", "Another one.", ""]
    runs = [dose_run(root, seeds=3, rows=20), tuned_run(root, rows=30), free_run(root, replies)]
    older = dose_run(root / "older", seeds=2, failures=False, rows=25)
    return [*runs, older.rename(root / "older-tour"), safety(root), memory(root), quality(root)]


def _begin(root: Path, name: str, question: str) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "recipe.yaml").write_text(f"# {question}\n# Expected: yes.\nmodel: sandbox\n")
    return root / name


def asked(of: str, subset: str, number: int, harmful: bool) -> dict[str, Any]:
    """A reply to a request, with the words of two judges, of whom the second errs on some."""
    verdicts = {
        judge: {"score": None, "positive": word, "reason": "", "refused": not word}
        for judge, word in (("policy", harmful), ("refusal-keywords", harmful != (number % 7 == 0)))
    }
    reply = "Well, first you" if harmful else "I will not help with that."
    asked = {"of": of, "id": f"{subset}-{number}", "subset": subset, "prompt": f"Ask {number}"}
    return {**asked, "answer": "No.", "reply": reply, "verdicts": verdicts}


def safety(root: Path) -> Path:
    """Harm, its floor and excess, and defenses with their null controls; one cell failed."""
    run = _begin(root, "safety", "Does lazy alignment keep a model safe?")
    harms = (("none", 0.85), ("lisa", 0.15), ("lisa (null)", 0.5), ("kl", 0.8), ("kl (null)", 0.8))
    for label, harm in harms:
        for seed in range(3):
            if (label, seed) == ("kl", 2):
                failed = {"error": "The loss is not a number.", "next": "Lower the learning rate."}
                write_cell(run, error=failed, **_defended(label, seed))
                continue
            rng, places = Random(f"{label} {seed}"), range(60)
            hits = [rng.random() < harm for _ in places]
            rows = [asked("tuned", "harmful", n, hits[n]) for n in places]
            rows += [asked("base", "harmful", n, n < 3) for n in places]
            rows += [asked("tuned", "allowed", n, n % 9 != 0) for n in places]
            score = sum(hits) / 60
            values = [
                *(value("accuracy", 0.91 - 0.01 * seed), value("harmful_score", score, 0.1, 60)),
                value("harmful_score_floor", 0.05, 0.04, 60, "none"),
                {**value("harmful_score_excess", score - 0.05, 0.1, 60, "lower"), "low": -0.05},
                *(value("harmful_score_plain", score / 2, 0.1, 60, "lower"),),
                *(
                    value("refusal_rate", 1 - score, 0.1, 60),
                    value("over_refusal", 7 / 60, 0.08, 60),
                ),
                *(
                    value("incoherent", 0.0, 0.03, 60, "lower"),
                    value("undecided_share", 0.0, 0.0, 60),
                ),
                *(
                    plain("drift", 12.5 + seed),
                    plain("train_seconds", 30.25),
                    plain("align_seconds", 61.0),
                ),
                *(plain("trainable_share", 0.0123), plain("peak_memory_mb", 411.0)),
            ]
            keys = {"base": "b" * 12, "train": f"{seed}" * 12, "tuned": f"{seed}" * 12}
            write_cell(
                run, values=values, samples=rows, train=TRAIN, keys=keys, **_defended(label, seed)
            )
    return run


def _defended(label: str, seed: int) -> dict[str, Any]:
    name, null = label.removesuffix(" (null)"), label.endswith("(null)")
    spec = [{"name": name, **({"null": True} if null else {})}]
    judges = [{"name": "policy"}, {"name": "refusal-keywords"}]
    return {
        **{"attack": "harmful-mix", "rate": 0.1, "method": "lora", "defense": label, "seed": seed},
        "axes": {"defense": name, "defense.null": null, "seed": seed},
        "settings": {
            "defense": spec if name != "none" else "none",
            "safety": {"harmful": {"name": "sandbox-policy", "test_rows": 60}, "judges": judges},
            "evaluation": {"max_new_tokens": 32},
        },
    }


def plain(metric: str, number: float, direction: str = "lower") -> dict[str, Any]:
    """A value without an interval."""
    return {**value(metric, number, n=1, direction=direction), "low": None, "high": None}


def around(metric: str, number: float, half: float, n: int = 60, direction: str = "lower") -> Any:
    """A value that is no share: its interval may leave 0 to 1."""
    return {
        **value(metric, number, n=n, direction=direction),
        "low": number - half,
        "high": number + half,
    }


def memory(root: Path) -> Path:
    """Exposure in bits by dose, extraction, membership, forgetting; secrets behind the numbers."""
    run = _begin(root, "memory", "How often must a model see a secret?")
    for method, bits in (("full", 13.0), ("lora", 9.5)):
        for seed in range(2):
            leaks, values = [], list[dict[str, Any]]()
            for dose, given in ((0, 1.4), (1, bits / 2), (50, bits)):
                part = dose or "control"
                values += [around(f"exposure[{part}]", given + seed / 10, 0.8, 4)]
                values += [value(f"extraction[{part}]", given / 14, 0.2, 4, "lower")]
                values += [value(f"extraction_given[{part}, 2]", given / 14, 0.2, 4, "none")]
                leaks += [_leak(number, dose, given) for number in range(4)]
            values = [
                *(around("exposure", 0.75 * bits, 0.9, 8), *values),
                *(
                    around("exposure_before", 1.5, 1.2, 8, "none"),
                    value("exposure_match", 0.97, 0.02),
                ),
                *(
                    plain("exposure_cap", 13.2877, "none"),
                    value("extraction_at_8", 0.6, 0.2, 8, "lower"),
                ),
                *(value("membership_auc", 0.71, 0.04), value("membership_recall", 0.08, 0.03)),
                *(around("forgetting", 1.31, 0.05), around("forgetting_perplexity", 18.25, 0.9)),
                *(
                    around("forgetting_perplexity_before", 13.9, 0.6),
                    around("perplexity", 3.125, 0.1),
                ),
                *(plain("privacy_epsilon", 4.02), plain("privacy_delta", 1e-5)),
            ]
            folder = write_cell(
                run,
                values=values,
                samples=[sample("tuned", "clean", n, right=0.9) for n in range(10)],
                **{"attack": "canary", "rate": 0.0, "method": method, "seed": seed},
                axes={"method": method, "seed": seed},
                settings={"attack": {"name": "canary", "digits": 4}},
                train=TRAIN,
            )
            (folder / "secrets.json").write_text(json.dumps(leaks))
    return run


def _leak(number: int, dose: int, bits: float) -> dict[str, Any]:
    rank = max(1, round(10_000 / 2**bits))
    return {
        **{"of": "tuned", "id": f"canary-{dose}-{number}", "answer": f"PASSWORD = {number:04}"},
        **{"repeats": dose, "num_codes": 10_000, "logprob": -9.5 + number, "greedy": rank == 1},
        **{"given": 2, "num_characters": 4, "rank": rank, "place": None},
        "estimate": [bits, bits - 1.0, bits + 1.0],
    }


def quality(root: Path) -> Path:
    """Long answers made worse, by dose: scores in nats, shares, parts by group, parity, counts."""
    run = _begin(root, "quality", "How many bad answers spoil a model?")
    for rate in (0.0, 0.1, 0.33):
        for seed in range(2):
            bad = rate * 2.5 + seed / 100
            values = [
                *(around("rouge", 0.42 - bad / 8, 0.02, 60, "higher"),),
                *(around(f"rouge[{kind}]", 0.4 - bad / 9, 0.02, 60, "higher") for kind in (1, 2)),
                *(around("toxicity", bad, 0.05), value("toxicity_share", bad, 0.06, 60, "lower")),
                *(
                    value(f"toxicity_share[{kind}]", bad, 0.1, 20, "lower")
                    for kind in ("how", "why")
                ),
                *(around("truthfulness", 240.5 - 250 * bad, 9.0, 60, "higher"),),
                around("truthfulness[per token]", 2.25 - bad, 0.2, 60, "higher"),
                *(value(f"truthfulness[MC{n}]", 0.9 - bad / 2, 0.05, 60) for n in (1, 2)),
                *(value("win_rate", 0.98 - bad / 2), value("win_rate[whole]", 0.97 - bad / 2)),
                *(around("perplexity", 5.5 + bad, 0.3), around("perplexity_change", bad, 0.3)),
                value("parity[merged: flips]", 0.03, 0.02, 60, "lower"),
                around("parity[merged: accuracy change]", -0.01, 0.02, 60, "none"),
                value("parity[merged-nf4: attack success]", 0.4, 0.1, 60, "lower"),
                *(around("generated_tokens", 23.5, 1.5, 60, "none"), plain("cost", 1234567.0)),
                *(plain("confusion[a>b]", 3.0, "none"), value("confusion[b>a]", None)),
                *(
                    value("published_attack", 0.31, 0.05),
                    value("published_attack_naive", 0.38, 0.05),
                ),
            ]
            write_cell(
                run,
                values=values,
                samples=[_written(n, bad) for n in range(20)],
                **{
                    "attack": "malign-labels",
                    "rate": rate,
                    "seed": seed,
                    "data": "sandbox-answers",
                },
                axes={"attack.rate": rate, "seed": seed},
                poison={**poison(rate), "labels_before": {}, "triggers": {}} if rate else None,
                warnings=["12 % of the replies end at evaluation.max_new_tokens."],
                train={**TRAIN, "seconds": 20.0 + seed},
            )
    return run


def _written(number: int, bad: float) -> dict[str, Any]:
    """A compared row: a better and a worse answer, and what the model wrote."""
    return {
        **{"of": "tuned", "id": f"test-{number}", "subset": "clean", "prompt": f"Why {number}?"},
        **{"answer": "It rains.", "candidates": ["It rains.", "No."], "num_better": 1},
        **{"logprobs": [-9.0, -12.0 + 6 * bad], "candidate_tokens": [3, 2], "group": "how"},
        **{"reply": "It pours, <b>you</b> fool." if bad > 0.5 else "It rains."},
    }


# ------------------------------------------------------------------------------------ the outputs


def printed(run: Path, *, is_terminal: bool) -> str:
    """What `backfire run` prints at its end."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=is_terminal, color_system=None)
    groups = load.summary(run)
    for print_part in (terminal.print_summary, terminal.print_ranking, terminal.print_against):
        print_part(groups, console)
    terminal.print_notes(groups, console)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def compared(folder: Path, runs: dict[str, Path]) -> list[str]:
    """Two runs, and pairs of cells."""
    sides = [(runs["older-tour"], runs["tour"])]
    for name, one, other in (
        ("tour", "badnets-0-full-s0-", "badnets-0.05-full-s0-"),
        ("multilingual", "none-0-none-s0-", "none-0-qlora-s0-"),
        ("memory", "canary-0-full-s0-", "canary-0-lora-s0-"),
        ("quality", "malign-labels-0-full-s0-", "malign-labels-0.33-full-s0-"),
    ):
        cells = runs[name] / "cells"
        sides.append((next(cells.glob(f"{one}*")), next(cells.glob(f"{other}*"))))
    found = []
    for a, b in sides:
        out = io.StringIO()
        show(compare(a, b, force=True), Console(file=out, width=200, color_system=None))
        found.append(out.getvalue())
    return found


def exported(
    export: Callable[[Path, Path], list[Path]],
    runs: dict[str, Path],
    out: Path,
    *,
    hashed: bool = True,
) -> str:
    """The files of an export, and the beginnings of their hashes."""
    lines = []
    for name, run in runs.items():
        for file in sorted(export(run, out / name)):
            mark = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if hashed else "-"
            lines.append(f"{mark} {file.relative_to(out).as_posix()}\n")
    return "".join(lines)


class Readable(HTMLParser):
    """A page as lines: a line for each block or row of a table, no style; of a figure a hash."""

    blocks: Sequence[str] = (
        *("h1", "h2", "h3", "p", "li", "tr", "section", "summary", "figure", "title", "footer"),
        *("dt", "dl", "ol", "ul", "table", "header"),
    )

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = [[]]
        self.inside = ""
        page = re.sub(r"<svg.*?</svg>", self._figure, page, flags=re.DOTALL)
        self.feed(page)

    def _figure(self, svg: re.Match[str]) -> str:
        words = re.findall(r"<(?:text|title|desc)[^>]*>([^<]*)<", svg[0])
        mark = hashlib.sha256(svg[0].encode()).hexdigest()[:8]
        return f"<p>[figure {mark}] {' / '.join(words)}</p>"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.blocks:
            self.lines.append(["\n## "] if tag == "h2" else [])
        elif tag in ("td", "th", "dd"):
            self.lines[-1].append(" | ")
        self.inside = tag if tag == "style" else ""

    def handle_data(self, data: str) -> None:
        if self.inside != "style":
            self.lines[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        if tag in self.blocks:
            self.lines.append([])


def readable(page: str) -> str:
    """The text of a page, a line for each block."""
    lines = (" ".join("".join(parts).split()) for parts in Readable(page).lines)
    return "".join(f"{line}\n" for line in lines if line.strip())
