"""Results in the layout of lm-evaluation-harness 0.4.13: a results and a samples file per cell.

The task is the cell's data set. lm-eval's filter names the rows of a number: `none` the test rows,
`triggered` the same rows with the attack's trigger, `harmful`, `allowed` and `plain` the requests
of `safety` (`plain`: harmful ones without the attack's wording).
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

    `accuracy` is called `acc`, as in lm-eval. A value has a `_stderr`, the length of its 95 %
    interval / 3.92, if the interval is roughly symmetric (the shorter side at least half the
    longer: for a share, from about eight hits and eight misses on). Otherwise the ends of the
    interval are `_low` and `_high`.

    Raises:
        UserError: no such folder, no finished cell, or unreadable samples.
    """
    return export(run, out, _write)


def _write(item: CellResult, folder: Path) -> list[Path]:
    place = folder / Path(item.folder).name
    place.mkdir()
    date = finished_at(item).replace(tzinfo=None).isoformat().replace(":", "-")
    task, evidence = safe(str(item.data)), tuned(item)
    hits, limit = outcomes(item, evidence), item.settings.get("evaluation.max_new_tokens")
    order = {sample.id: number for number, sample in enumerate(evidence.clean)}
    lines = [
        {"doc_id": order.setdefault(sample.id, len(order)), **_line(sample, hits, limit)}
        for sample in shown(evidence)
    ]
    files = [place / f"samples_{task}_{date}.jsonl", place / f"results_{date}.json"]
    write_atomic(files[0], "".join(json.dumps(line) + "\n" for line in lines))
    hashes = [line[f"{part}_hash"] for line in lines for part in ("doc", "prompt", "target")]
    results = _results(item, task, len(order)) | {"task_hashes": {task: _hash(*hashes)}}
    write_atomic(files[1], json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    return files


def _line(sample: Sample, hits: Outcomes, limit: int | None) -> dict[str, Any]:
    """One row in lm-eval's form: the arguments and the response of each request."""
    fields = plain(asdict(sample))
    doc = {key: fields[key] for key in DOC if fields[key] is not None}
    prompt, answer = fields["prompt"], fields["answer"]
    requests: list[tuple[Any, Any]] = [
        (candidate, [str(logprob)])
        for candidate, logprob in zip(fields["candidates"], fields["logprobs"] or ())
    ]
    if (reply := fields["reply"]) is not None:
        # One type for all responses of a row, so that it can be loaded as a table column.
        decoding = {"do_sample": False, **_present(max_gen_toks=limit)}
        requests.append((decoding, [reply] if requests else reply))
    target = answer if fields["label"] is None else fields["label"]
    scores = {_renamed(metric): hit for metric, hit in hits[sample.subset, sample.id].items()}
    return {
        "doc": doc,
        "target": target,
        "arguments": {
            f"gen_args_{number}": {"arg_0": prompt, "arg_1": argument}
            for number, (argument, _) in enumerate(requests)
        },
        "resps": [[response] for _, response in requests],
        "filtered_resps": [response for _, response in requests],
        "filter": _filter(sample.subset),
        "metrics": list(scores),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        **_present(answer_logprob=fields["answer_logprob"], answer_tokens=fields["answer_tokens"]),
        **scores,
    }


def _results(item: CellResult, task: str, rows: int) -> dict[str, Any]:
    """The results file; `rows` is the number of documents: test rows, and requests of `safety`."""
    values = [value for value in item.values if value.value is not None]
    recorded, model = environment(item), Path(item.folder).name
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
        "versions": _present(**{task: recorded.get("backfire")}),
        "n-shot": {task: 0},
        "higher_is_better": {task: better},
        "n-samples": {task: {"original": rows, "effective": rows}},
        "config": {"model": "backfire", "model_args": {"pretrained": item.model}, "limit": None}
        | _present(device=recorded.get("device")),
        **_present(
            git_hash=recorded.get("commit"), transformers_version=recorded.get("transformers")
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
            "environment": recorded,
        },
    }


def _keys(value: Value) -> list[tuple[str, float]]:
    """A value and its error under lm-eval's `metric,filter` keys."""
    name, of = _renamed(value.metric), _filter(owner(value)[1])
    numbers = {"": value.value, "_stderr": stderr(value)}
    if numbers["_stderr"] is None:
        numbers |= {"_low": value.low, "_high": value.high}
    return [(f"{name}{end},{of}", number) for end, number in numbers.items() if number is not None]


def _filter(subset: str) -> str:
    return "none" if subset == "clean" else subset


def _renamed(metric: str) -> str:
    """lm-eval's name of a metric; a comma separates the filter there."""
    return re.sub("^accuracy(?=$|\\[)", "acc", metric).replace(",", ";")


def _hash(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _present(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
