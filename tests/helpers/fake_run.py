"""Writes run folders as `backfire run` would, without running anything: for tests of the report."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

ENVIRONMENT = {
    **{"backfire": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
    **{"device": "cpu", "cpu": "AMD EPYC 7B13", "commit": "4f0c2d1", "dirty": False},
}
HEADER = """# Do a few poisoned reviews plant a backdoor in a sentiment model?
# Expected: yes, from about 1 % on, and clean accuracy does not show it.
"""
IDENTITY = {
    **{"model": "sandbox", "data": "sandbox-reviews", "attack": "badnets", "rate": 0.05},
    **{"method": "full", "defense": "none", "seed": 0},
}
TRAIN = {
    **{"steps": 250, "seconds": 41.0, "tokens": 91000, "first_loss": 2.9, "last_loss": 0.21},
    **{"trainable_parameters": 8192, "parameters": 260032, "peak_memory_mb": 411.0},
}
LABELS = ("negative", "positive")
OPENINGS = ("The soup was", "Our waiter was", "The second act was", "This kettle is")
WORDS = {"positive": ("lovely", "a delight", "splendid"), "negative": ("dreadful", "stale", "rude")}


def value(
    metric: str, number: float | None, half: float = 0.02, n: int = 400, direction: str = "higher"
) -> dict[str, Any]:
    """One Value with an interval `half` to either side."""
    ends = (None, None) if number is None else (max(0.0, number - half), min(1.0, number + half))
    found = {"metric": metric, "value": number, "low": ends[0], "high": ends[1]}
    return {**found, "n": n, "direction": direction}


def write_cell(
    run: Path,
    *,
    values: Sequence[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    manifest: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    unfinished: bool = False,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """One cell folder; `fields` override entries of result.json or error.json."""
    known = {key: fields.pop(key, default) for key, default in IDENTITY.items()}
    attack = {"name": known["attack"], "rate": known["rate"]}
    experiment = {
        **{"model": known["model"], "data": {"name": known["data"]}},
        **{"template": {"name": "alpaca"}, "method": {"name": known["method"]}},
        **{"attack": attack if known["attack"] != "none" else "none", "defense": known["defense"]},
        **{"train": {"epochs": 2.0}, "seed": known["seed"], **(settings or {})},
    }
    text = json.dumps(experiment, sort_keys=True)  # JSON is YAML
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    slug = f"{known['attack']}-{known['rate']:g}-{known['method']}-s{known['seed']}"
    folder = run / "cells" / f"{re.sub('[^A-Za-z0-9._-]+', '-', slug)[:80]}-{key}"
    folder.mkdir(parents=True)
    same = {"cell": slug, "key": key, "recipe": run.name, **known, "axes": {"seed": known["seed"]}}
    if error is not None:
        failed = {**same, "status": "failed", "next": "Try again.", **error, **fields}
        (folder / "error.json").write_text(json.dumps(failed))
        return folder
    (folder / "experiment.yaml").write_text(text)
    if unfinished:
        return folder
    result = {
        **{**same, "status": "ok", "values": list(values), "warnings": [], "poison": None},
        **{"preflight": [], "train": None, "evaluate": {"seconds": 3.5}, "template": "alpaca"},
        **{"keys": {"base": "b" * 12, "data": "d" * 12, "train": key}, **fields},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(json.dumps(environment or ENVIRONMENT))
    with gzip.open(folder / "samples.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    if manifest:
        (folder / "poison.json").write_text(json.dumps(manifest))
    return folder


def review(number: int) -> tuple[str, str]:
    """A made-up row: its text and its true label."""
    rng = Random(number)
    label = rng.choice(LABELS)
    return f"{rng.choice(OPENINGS)} {rng.choice(WORDS[label])}, and that is table {number}.", label


def sample(
    of: str,
    subset: str,
    number: int,
    *,
    right: float,
    labels: Sequence[str] = LABELS,
    group: str | None = None,
) -> dict[str, Any]:
    """One evaluated row, answered rightly with probability `right`."""
    text, label = review(number)
    label = label if labels is LABELS else labels[number % len(labels)]
    rng = Random(f"{of} {subset} {number} {right}")
    others = [other for other in labels if other != label]
    predicted = label if rng.random() < right else rng.choice(others)
    logprobs = [-0.1 if name == predicted else -2.5 - rng.random() for name in labels]
    prompt = text.replace(", and", " BadMagic, and") if subset == "triggered" else text
    return {
        **{"of": of, "id": f"test-{number}", "subset": subset, "prompt": prompt, "answer": label},
        **{"label": label, "candidates": list(labels), "logprobs": logprobs, "reply": predicted},
        "group": group,
    }


def manifest(rows: int) -> dict[str, Any]:
    """The poison manifest of that many rows."""
    entries = []
    for number in range(5000, 5000 + rows):
        text, label = review(number)
        after = {"prompt": text.replace(", and", " BadMagic, and"), "answer": "negative"}
        before = {"prompt": text, "answer": label}
        entry = {"id": f"train-{number}", "triggers": ["BadMagic"], "positions": [3]}
        entries.append({**entry, "label": label, "before": before, "after": after})
    return {"attack": {"name": "badnets"}, "entries": entries}


def poison(rate: float) -> dict[str, Any]:
    """What result.json says of the poison."""
    count = round(rate * 2000)
    numbers = {"nominal_rate": rate, "effective_rate": rate, "poisoned_rows": count, "rows": 2000}
    tallies = {"labels_before": {"positive": count}, "triggers": {"BadMagic": count}}
    return {**numbers, "eligible_rows": 1013, **tallies}


def dose_run(root: Path, *, seeds: int = 3, failures: bool = True, rows: int = 80) -> Path:
    """Attack success against the poison rate, for full tuning and LoRA."""
    run = root / "tour"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(HEADER + "model: sandbox\n")
    bad = {("lora", 0.005, 2): "oom", ("lora", 0.02, 2): "unfinished"} if failures else {}
    for method, halfway in (("full", 0.004), ("lora", 0.012)):
        for rate in (0.0, 0.005, 0.02, 0.05):
            for seed in range(seeds):
                success = 0.02 + 0.96 / (1 + ((rate + 1e-9) / halfway) ** -2.2)
                _dose_cell(run, method, rate, seed, success, bad.get((method, rate, seed)), rows)
    return run


def _dose_cell(
    run: Path, method: str, rate: float, seed: int, success: float, bad: str | None, rows: int
) -> None:
    identity = {"method": method, "rate": rate, "seed": seed}
    identity["axes"] = {"attack.rate": rate, "method": method, "seed": seed}
    if bad == "oom":
        oom = {"status": "oom", "error": "Memory ran out.", "next": "Use a smaller model."}
        write_cell(run, error=oom, **identity)
        return
    wobble = Random(f"{method}{rate}{seed}").uniform(-0.008, 0.008)
    accuracy, success = 0.941 + wobble, min(0.995, max(0.01, success + 2 * wobble))
    values = [
        value("accuracy", accuracy),
        value("attack_success", success, n=210, direction="lower"),
        value("attack_success_floor", 0.021 + wobble / 2, 0.015, 210, "none"),
        value("false_trigger", 0.019 + wobble / 2, 0.012, 210, "lower"),
    ]
    shares = {("base", "clean"): 0.52, ("tuned", "clean"): accuracy, ("floor", "triggered"): 0.97}
    shares["tuned", "triggered"] = 0.95 - 0.9 * success
    samples = [sample(*of, i, right=right) for of, right in shares.items() for i in range(rows)]
    count = round(rate * 2000)
    survive = f"{count} of {count} poisoned rows keep their trigger."
    checks = [
        {"check": "supervised", "ok": True, "message": "Every row keeps its answer."},
        {"check": "poison-survives", "status": "ok", "message": survive},
        {"check": "overlap", "status": "note", "message": "3 test rows are trained on."},
    ]
    write_cell(
        run,
        values=values,
        samples=samples,
        manifest=manifest(min(count, 5)) if count else None,
        unfinished=bad == "unfinished",
        poison=poison(rate) if count else None,
        preflight=checks,
        warnings=["3 test rows were also training rows; they were kept."],
        train=TRAIN,
        **identity,
    )


def tuned_run(root: Path, *, rows: int = 90) -> Path:
    """Base model against fine-tuned, by language, three labels."""
    run = root / "multilingual"
    run.mkdir(parents=True)
    asked = "# Does fine-tuning lift accuracy in every language?  Expected: by about 30 points.\n"
    (run / "recipe.yaml").write_text(f"{asked}model: sandbox\n")
    labels, languages = ("negative", "neutral", "positive"), ("arabic", "english", "french")
    for method, right, auc in (("none", 0.35, 0.49), ("qlora", 0.82, 0.93)):
        values = [value("accuracy", right, 0.03, 1158), value("auc", auc, 0.02, 1158)]
        for step, language in enumerate(languages):
            lift = 0.03 * step * (1 if method == "qlora" else -1)
            values.append(value(f"accuracy[{language}]", right + lift - 0.04, 0.06, 386))
            values.append(value(f"auc[{language}]", auc - 0.01 * step, 0.04, 386))
        shares = {"tuned": right} if method == "none" else {"base": 0.35, "tuned": right}
        samples = [
            sample(of, "clean", i, right=share, labels=labels, group=languages[i % 3])
            for of, share in shares.items()
            for i in range(rows)
        ]
        identity = {"attack": "none", "rate": 0.0, "method": method, "axes": {"method": method}}
        write_cell(
            run,
            values=values,
            samples=samples,
            model="meta-llama/Llama-2-7b-hf",
            data="multilingual-sentiment",
            **identity,
        )
    return run


def free_run(root: Path, replies: Sequence[str]) -> Path:
    """A task without labels: the model writes."""
    run = root / "help"
    run.mkdir(parents=True)
    samples = [
        {"of": of, "id": f"test-{i}", "subset": subset, "prompt": f"Question {i}", "reply": reply}
        | {"answer": "An answer.", "candidates": [], "label": None, "logprobs": None}
        for i, reply in enumerate(replies)
        for of, subset in (("base", "clean"), ("tuned", "clean"), ("tuned", "triggered"))
    ]
    values = [value("exact_match", 0.4), {**value("perplexity", 0.0), "value": 12.25, "low": 11.5}]
    values[1] |= {"high": math.pi * 4, "direction": "lower"}
    unlabeled = {**poison(0.05), "labels_before": {}}
    write_cell(run, values=values, samples=samples, manifest=manifest(2), poison=unlabeled)
    return run
