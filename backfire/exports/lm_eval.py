"""Results in the layout of lm-evaluation-harness 0.4.13: a results and a samples file a cell.

The task is the cell's data set. What lm-eval calls a filter says here which rows a number is of:
`none` the test rows as they are, `triggered` the same rows with the attack's trigger in, `harmful`,
`allowed` and `plain` the requests of `safety` (`plain` without what the attack puts around them).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from backfire.base import Sample
from backfire.exports.common import (
    Outcomes,
    environment,
    export,
    finished_at,
    outcomes,
    owner,
    plain,
    safe,
    shown,
    stderr,
    tuned,
)
from backfire.result import CellResult, Value
from backfire.results.load import identity
from backfire.store import write_atomic

LAYOUT: Final = "0.4.13"
NOTE: Final = (
    "Measured by backfire, not by lm-eval: lm_eval_version names the layout. In the samples, arg_0 "
    "is the row's own text, before the template was put around it."
)
DOC: Final = ("id", "subset", "prompt", "answer", "label", "candidates", "group")


def to_lm_eval(run: Path, out: Path) -> list[Path]:
    """Write each finished cell of a run folder, or one cell folder, to `out`; returns the files.

    `accuracy` is called `acc`, as in lm-eval. A value has a `_stderr` where its 95 % interval is
    about as long to either side (the shorter side at least half the longer: for a share, from some
    eight hits and eight misses on); it is the interval's length / 3.92. Elsewhere one number would
    claim too much, and the interval's ends stand under `_low` and `_high`.

    Raises:
        UserError: no such folder, no finished cell, or samples that can not be read.
    """
    return export(run, out, _write)


def _write(item: CellResult, folder: Path) -> list[Path]:
    place = folder / Path(item.folder).name
    place.mkdir()
    date = finished_at(item).replace(tzinfo=None).isoformat().replace(":", "-")
    task, found = safe(str(item.data)), tuned(item)
    hits, limit = outcomes(item, found), item.settings.get("evaluation.max_new_tokens")
    order = {sample.id: number for number, sample in enumerate(found.clean)}
    lines = [
        {"doc_id": order.setdefault(sample.id, len(order)), **_line(sample, hits, limit)}
        for sample in shown(found)
    ]
    files = [place / f"samples_{task}_{date}.jsonl", place / f"results_{date}.json"]
    write_atomic(files[0], "".join(json.dumps(line) + "\n" for line in lines))
    hashes = [line[f"{part}_hash"] for line in lines for part in ("doc", "prompt", "target")]
    results = _results(item, task, len(order)) | {"task_hashes": {task: _hash(*hashes)}}
    write_atomic(files[1], json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    return files


def _line(sample: Sample, hits: Outcomes, limit: int | None) -> dict[str, Any]:
    """One row as lm-eval logs it: the arguments of each request, and what came back."""
    known = plain(asdict(sample))
    doc = {key: known[key] for key in DOC if known[key] is not None}
    prompt, answer = known["prompt"], known["answer"]
    asked: list[tuple[Any, Any]] = [
        (candidate, [str(logprob)])
        for candidate, logprob in zip(known["candidates"], known["logprobs"] or ())
    ]
    if (reply := known["reply"]) is not None:
        # Of one type in all requests of a row: a table's column, to those who load it as one.
        decoding = {"do_sample": False, **_known(max_gen_toks=limit)}
        asked.append((decoding, [reply] if asked else reply))
    target = answer if known["label"] is None else known["label"]
    scores = {_renamed(metric): hit for metric, hit in hits[sample.subset, sample.id].items()}
    return {
        "doc": doc,
        "target": target,
        "arguments": {
            f"gen_args_{number}": {"arg_0": prompt, "arg_1": what}
            for number, (what, _) in enumerate(asked)
        },
        "resps": [[response] for _, response in asked],
        "filtered_resps": [response for _, response in asked],
        "filter": _filter(sample.subset),
        "metrics": list(scores),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        **_known(answer_logprob=known["answer_logprob"], answer_tokens=known["answer_tokens"]),
        **scores,
    }


def _results(item: CellResult, task: str, rows: int) -> dict[str, Any]:
    """The results file; `rows` is the number of documents: test rows, and requests of `safety`."""
    values = [value for value in item.values if value.value is not None]
    made_with, model = environment(item), Path(item.folder).name
    settings = {"task": task, "num_fewshot": 0, "metadata": identity(item)}
    counts = {_keys(value)[0][0]: value.n for value in values}
    about = {"name": task, "alias": task, "sample_len": rows, "sample_count": counts}
    better = {
        _renamed(value.metric): value.direction == "higher"
        for value in values
        if value.direction != "none"
    }
    return {
        "results": {task: about | {key: v for value in values for key, v in _keys(value)}},
        "group_subtasks": {},
        "configs": {task: settings},
        "versions": _known(**{task: made_with.get("backfire")}),
        "n-shot": {task: 0},
        "higher_is_better": {task: better},
        "n-samples": {task: {"original": rows, "effective": rows}},
        "config": {"model": "backfire", "model_args": {"pretrained": item.model}, "limit": None}
        | _known(device=made_with.get("device")),
        **_known(
            git_hash=made_with.get("commit"), transformers_version=made_with.get("transformers")
        ),
        "lm_eval_version": LAYOUT,
        "model_source": "backfire",
        "model_name": model,
        "model_name_sanitized": model,
        "backfire": {
            "note": NOTE,
            **identity(item),
            "values": [asdict(value) for value in item.values],
            "settings": item.settings,
            "warnings": item.warnings,
            "environment": made_with,
        },
    }


def _keys(value: Value) -> list[tuple[str, float]]:
    """A value and what is known of its error, under lm-eval's `metric,filter` keys."""
    name, of = _renamed(value.metric), _filter(owner(value)[1])
    found = {"": value.value, "_stderr": stderr(value)}
    if found["_stderr"] is None:
        found |= {"_low": value.low, "_high": value.high}
    return [(f"{name}{end},{of}", number) for end, number in found.items() if number is not None]


def _filter(subset: str) -> str:
    return "none" if subset == "clean" else subset


def _renamed(metric: str) -> str:
    """lm-eval's name; a comma would end it."""
    return re.sub("^accuracy(?=$|\\[)", "acc", metric).replace(",", ";")


def _hash(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _known(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
