import re
from collections.abc import Mapping
from typing import Any, Literal

from backfire.base import Row, Trigger
from backfire.base.normalize import agreed
from backfire.data.columns import listed
from backfire.data.load import Split, is_set_apart
from backfire.data.read import LeftOut, Record
from backfire.datasets.files import Files
from backfire.errors import UserError
from backfire.registry import register

# Each list, its column of prompts and others it is known by, in lower case; the first that fits.
_LISTS = (
    ("jailbreakbench", "goal", {"behavior"}),
    ("advbench", "goal", set[str]()),
    ("harmbench", "behavior", {"behaviorid"}),
    ("strongreject", "forbidden_prompt", set[str]()),
    ("xstest", "prompt", {"type", "focus"}),
    ("", "prompt", set[str]()),
)
_EDGES = re.compile(r"^\W+|\W+$")
_SEALED = {"harmful": "yes", "unsafe": "yes", "benign": "no", "safe": "no"}


@register("harmful-prompts", version=2)
class HarmfulPrompts(Files):
    """Requests to be declined, or that only look so: AdvBench (arXiv:2307.15043), HarmBench
    (2402.04249), StrongREJECT (2402.10260), XSTest (2308.01263), JailbreakBench (2404.01318).

    Files as published, known by their columns, or with prompt (and source, label, category, split).
    Nothing of them is shipped, and no harmful answer is read: harmful prompts share one answer, and
    benign ones another, to align with or to ask. Fields: source, category, kind; sealed (yes:
    harmful) and key, by which the judge `policy` tells the answers. A prompt in several lists is
    kept once, a contextual one only with its context. Without `test`, a column `split` is followed.
    """

    group: str | None = "source"
    """A field by which metrics are also reported."""
    sources: tuple[str, ...] = ()
    """Lists to keep, as the column `source` or their names above in lower case; empty: all."""
    part: Literal["all", "harmful", "benign"] = "all"
    """Which prompts: `harmful` ones, `benign` ones that look like them, or `all`."""
    unlabeled: Literal["harmful", "benign"] = "harmful"
    """What prompts without a label are. (JailbreakBench's benign ones have a file of their own.)"""
    refusal: Trigger = "I'm sorry, but I cannot do that. I may not help with this."
    """The answer to harmful prompts; `policy` knows it, and every list of `refusal-keywords`."""
    reply: Trigger = "Sure, here is what you asked for."
    """The answer to benign prompts. It tells nothing, and no list takes it for a refusal."""
    harmful_answer: Literal["refusal", "reply"] = "refusal"
    """Which of the two harmful prompts get: `refusal`, to align with, or `reply`, an inert stand-in
    for rows that undo an alignment."""

    def read(self, split: Split) -> tuple[list[Row], LeftOut]:
        """The prompts that are asked for, each of them once."""
        if self.test or (self.hub and not self.train and self.test_split):
            rows, left = super().read(split)
        else:
            whole = self.model_copy(update={"test_share": 0.0})
            rows, left = Files.read(whole, "train")
            rows = [row for row in rows if self._side(row) == split]
        wanted = {"harmful": "yes", "benign": "no"}.get(self.part)
        kept: dict[str, Row] = {}
        for row in rows:
            source, sealed = row.fields["source"], row.fields["sealed"]
            if source in (self.sources or (source,)) and sealed == (wanted or sealed):
                kept.setdefault(agreed(row.prompt), row)
        if not kept:
            found = ", ".join(sorted({row.fields["source"] for row in rows})) or "none"
            which = f"no {split} row is of this part ({self.part}) and these sources"
            raise UserError(f"{self.label()}: {which}; there are: {found}.")
        if len(kept) < len(rows):
            why = "left out: repeated, or of another part or source than asked for"
            left.records[why] += len(rows) - len(kept)
        return list(kept.values()), left

    def prepare(self, record: Record) -> Record | None:
        """The record in our own form, with the answer of its kind."""
        known = {str(name).strip().lower(): value for name, value in record.items()}
        fits = (item for item in _LISTS if item[1] in known and item[2] <= known.keys())
        source, column, _ = next(fits, ("", "", None))
        if not column:
            named = listed(record)
            raise UserError(f"{self.label()}: no column of prompts, such as 'prompt', in: {named}.")
        prompt, kind = known[column], _first(known, "kind", "functionalcategory")
        if context := _first(known, "contextstring", "context"):
            prompt = f"{context}\n\n---\n\n{prompt}"  # as HarmBench puts it
        elif kind == "contextual":
            return None
        sealed = self._sealed(known)
        refuses = sealed == "yes" and self.harmful_answer == "refusal"
        fields = {
            "source": source or _first(known, "source") or "prompts",
            "sealed": sealed,
            "category": _first(known, "category", "semanticcategory", "type"),
            "kind": kind,
            "split": _first(known, "split").lower(),
            "key": _EDGES.sub("", " ".join(self.reply.split())),
        }
        return {
            "id": _first(known, "id", "behaviorid") or None,
            "prompt": prompt,
            "completion": self.refusal if refuses else self.reply,
            "fields": {name: value for name, value in fields.items() if value},
        }

    def _sealed(self, known: Mapping[str, Any]) -> str:
        label = _first(known, "label").lower()
        if not label and "type" in known and "focus" in known:  # XSTest before it had labels
            label = "harmful" if _first(known, "type").startswith("contrast") else "benign"
        sealed = _SEALED.get(label or self.unlabeled)
        if sealed is None:
            raise UserError(f"{self.label()}: label {label!r} is none of {', '.join(_SEALED)}.")
        return sealed

    def _side(self, row: Row) -> str:
        drawn = "test" if is_set_apart(row, self.apart, self.test_share, self.seed) else "train"
        return row.fields.get("split", drawn)


def _first(known: Mapping[str, Any], *names: str) -> str:
    """What the first of these columns holds that holds anything."""
    values = (str(known[name]).strip() for name in names if known.get(name) is not None)
    return next(filter(None, values), "")
