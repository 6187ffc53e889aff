"""The result as a Markdown table: speed, memory and equality side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TARGETS = {"training loop": "≥ 1.0", "evaluation": "≥ 4", "peak memory": "≤ 1.1"}
SMALL_TARGETS = {"training loop": "≥ 2.5", "evaluation": "≥ 8", "peak memory": "≤ 0.5"}
"""Targets of the `small` cell, with the same type of products on both sides."""
FASTER = "≥ 4"
"""Target of its training in bfloat16 against a script in float32."""
_PHASES = {
    "train": "training: rows to saved model, s",
    "training loop": "training: steps alone, s",
    "training loop, trl": "training: steps alone, TRL's SFTTrainer instead of Trainer, s",
    "scores": "label scoring, s",
    "scores, baseline, grouped": "label scoring, baseline with lm-eval's one-token shortcut, s",
    "replies": "replies of the fine-tuned model, s",
    "evaluation": "scoring and replies of the fine-tuned model, s",
    "replies of the base": "replies of the untuned model, s",
}
Row = tuple[str, str, str, str, str]


def markdown(result: Mapping[str, Any]) -> str:
    """The settings and machine of a result, and one table per cell."""
    made, settings = result["environment"], result["settings"]
    lines = [
        f"# {result['name']}, {result['when'][:10]}",
        "",
        f"backfire against `Trainer` + PEFT + `generate` on the same rows, in the same order. "
        f"Medians of {settings['repetitions']} alternating runs in one process, "
        f"{settings['threads']} thread(s), {settings['compute']} products; each side's memory in "
        f"a separate process. {made['cpu']}, torch {made['torch']}, transformers "
        f"{made['transformers']}, peft {made['peft']}. Load average before and after: "
        f"{result['load']['before']:.1f}, {result['load']['after']:.1f} on {made['cores']} cores.",
    ]
    for cell in result["cells"]:
        lines += ["", *_cell(cell)]
    lines += [f"\n{reason}" for reason in result["skipped"]]
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, Any]) -> list[str]:
    tokens, experiment = cell["tokens"], cell["experiment"]
    targets = _targets(cell)
    memory = _memory(cell["usage"], targets["peak memory"]) if "usage" in cell else []
    rows = _speed(cell, targets) + memory + _equality(cell)
    return [
        f"## {cell['title']}, template {experiment['template']['name']}",
        "",
        f"{cell['parameters'] / 1e6:.2f} M parameters; {cell['rows']['train']} training rows of "
        f"{tokens['mean row']} tokens, {experiment['train']['epochs']:g} epochs of batch "
        f"{experiment['train']['batch_size']}; {cell['rows']['test']} test rows.",
        "",
        "| | Trainer + PEFT + generate | backfire | ratio (of CPU time) | target |",
        "|---|---:|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _targets(cell: Mapping[str, Any]) -> dict[str, str]:
    if not cell["title"].startswith("small"):
        return TARGETS
    mixed = cell["mfu"]["peak_of"]
    faster = {"training loop": FASTER} if mixed["baseline"] != mixed["backfire"] else {}
    return SMALL_TARGETS | faster


def _speed(cell: Mapping[str, Any], targets: Mapping[str, str]) -> list[Row]:
    medians, ratios, tokens = cell["medians"], cell["ratios"], cell["tokens"]
    cpu = cell["cpu"]["ratios"]
    rows: list[Row] = []
    for phase, name in _PHASES.items():
        of, _, variant = phase.partition(", ")
        if variant and variant not in medians[of]:  # TRL is not installed
            continue
        pair = medians[of][variant or "baseline"], medians[of]["backfire"]
        rows.append(
            (
                name,
                f"{pair[0]:.2f}",
                f"{pair[1]:.2f}",
                f"{ratios[phase]:.2f} ({cpu[phase]:.2f})",
                targets.get(phase, ""),
            )
        )
    loop = medians["training loop"]
    theirs, ours = (f"{tokens['train'] / loop[who]:,.0f}" for who in ("baseline", "backfire"))
    rows.append(("useful tokens per second in training", theirs, ours, "", ""))
    reached, types = cell["mfu"]["useful_mfu"], cell["mfu"]["peak_of"]
    pair = [f"{reached[who]:.0%} ({types[who]})" for who in ("baseline", "backfire")]
    peaks = ", ".join(f"{v / 1e9:.0f} in {k}" for k, v in sorted(cell["mfu"]["peak"].items()))
    name = f"useful MFU of the steps; measured peak in GFLOP/s: {peaks}"
    return [*rows, (name, pair[0], pair[1], "", "")]


def _memory(usage: Mapping[str, Any], most: str) -> list[Row]:
    """Rows of peak memory, and of computed token positions per useful token."""
    ours, theirs = usage["backfire"], usage["baseline"]
    rows: list[Row] = []
    for part, target in (("imports", ""), ("training", ""), ("whole cell", most)):
        pair = theirs["peak_mb"][part], ours["peak_mb"][part]
        name = f"peak memory, {part}, MB"
        rows.append((name, f"{pair[0]:.0f}", f"{pair[1]:.0f}", f"{pair[1] / pair[0]:.2f}", target))
    for phase, useful in usage["useful"].items():
        for place in ("body", "head"):
            run = [side["positions"][phase][place] / useful for side in (theirs, ours)]
            name = f"positions through the {place} per useful token, {phase}"
            rows.append((name, f"{run[0]:.3f}", f"{run[1]:.3f}", f"{run[0] / run[1]:.2f}", ""))
    return rows


def _equality(cell: Mapping[str, Any]) -> list[Row]:
    equality = cell["equality"]
    rows: list[Row] = [
        ("same token ids", "", "yes" if equality["same tokens"] else "NO", "", "yes"),
        (
            f"largest difference of the loss, {equality['steps compared']} steps",
            "",
            f"{equality['loss difference']:.1e}",
            "",
            "",
        ),
    ]
    if (trl := equality["loss difference, trl"]) is not None:
        rows.append(("the same between backfire and TRL", "", f"{trl:.1e}", "", ""))
    for name, text in (
        ("log-likelihood difference", "largest difference of a log-likelihood, same weights, nats"),
        ("log-likelihood difference, own weights", "the same, each side's own weights, nats"),
    ):
        rows.append((text, "", f"{equality[name]:.1e}", "", ""))
    for name, text in (
        ("equal replies", "equal replies, same weights"),
        ("equal replies of the base", "equal replies of the untuned model"),
        ("equal replies, own weights", "equal replies, each side's own weights"),
    ):
        rows.append((text, "", f"{equality[name]:.1%}", "", "100 %"))
    for name in ("last loss", "accuracy", "exact match"):
        pair = equality[name]
        rows.append((name, f"{pair['baseline']:.4f}", f"{pair['backfire']:.4f}", "", "equal"))
    return rows
