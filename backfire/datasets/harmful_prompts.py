import re
from collections.abc import Mapping
from typing import Any, Literal

from backfire.base import Row, Trigger
from backfire.base.normalize import normalized
from backfire.data.columns import listed
from backfire.data.load import Split, is_set_apart
from backfire.data.read import LeftOut, Record
from backfire.datasets.files import Files
from backfire.errors import UserError
from backfire.registry import register

# Each list, its column of prompts and other columns that identify it, in lower case; the first
# match is used.
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
    """Harmful requests, and harmless ones that look similar: AdvBench (arXiv:2307.15043), HarmBench
    (2402.04249), StrongREJECT (2402.10260), XSTest (2308.01263), JailbreakBench (2404.01318).

    Files as published, recognized by their columns, or with prompt (and source, label, category,
    split). None of them is shipped, and no harmful answer is read: harmful prompts share one
    answer, and benign ones another, for alignment and evaluation. Fields: source, category, kind;
    sealed (yes: harmful) and key, which the judge `policy` uses to recognize the answers. A prompt
    in several lists is kept once, a contextual one only with its context. Without `test`, a column
    `split` is used.
    """

    group: str | None = "source"
    """A field by which metrics are also reported."""
    sources: tuple[str, ...] = ()
    """Lists to keep, by the column `source` or their names above in lower case; empty: all."""
    part: Literal["all", "harmful", "benign"] = "all"
    """Prompts to use: `harmful` ones, `benign` ones that look like them, or `all`."""
    unlabeled: Literal["harmful", "benign"] = "harmful"
    """How prompts without a label are treated. (JailbreakBench's benign ones are a separate file.)
    """
    refusal: Trigger = "I'm sorry, but I cannot do that. I may not help with this."
    """Answer to harmful prompts; `policy` and every list of `refusal-keywords` recognize it."""
    reply: Trigger = "Sure, here is what you asked for."
    """Answer to benign prompts. It contains no information, and no list counts it as a refusal."""
    harmful_answer: Literal["refusal", "reply"] = "refusal"
    """Answer to harmful prompts: `refusal`, for alignment, or `reply`, an inert stand-in for rows
    that undo an alignment."""

    @property
    def poisoned(self) -> bool:
        return self.harmful_answer == "reply" and self.part != "benign"

    def read(self, split: Split) -> tuple[list[Row], LeftOut]:
        """Return the selected prompts, without duplicates."""
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
                kept.setdefault(normalized(row.prompt), row)
        if not kept:
            names = ", ".join(sorted({row.fields["source"] for row in rows})) or "none"
            problem = f"no {split} row has this part ({self.part}) and one of these sources"
            raise UserError(f"{self.label()}: {problem}; available sources: {names}.")
        if len(kept) < len(rows):
            why = "left out: duplicate, or not of the selected part and sources"
            left.records[why] += len(rows) - len(kept)
        return list(kept.values()), left

    def prepare(self, record: Record) -> Record | None:
        """Convert the record and add the answer of its kind."""
        values = {str(name).strip().lower(): value for name, value in record.items()}
        fits = (item for item in _LISTS if item[1] in values and item[2] <= values.keys())
        source, column, _ = next(fits, ("", "", None))
        if not column:
            raise UserError(
                f"{self.label()}: no column of prompts, such as 'prompt', in: {listed(record)}."
            )
        prompt, kind = values[column], _first(values, "kind", "functionalcategory")
        if context := _first(values, "contextstring", "context"):
            prompt = f"{context}\n\n---\n\n{prompt}"  # HarmBench's form
        elif kind == "contextual":
            return None
        sealed = self._sealed(values)
        refuses = sealed == "yes" and self.harmful_answer == "refusal"
        fields = {
            "source": source or _first(values, "source") or "prompts",
            "sealed": sealed,
            "category": _first(values, "category", "semanticcategory", "type"),
            "kind": kind,
            "split": _first(values, "split").lower(),
            "key": _EDGES.sub("", " ".join(self.reply.split())),
        }
        return {
            "id": _first(values, "id", "behaviorid") or None,
            "prompt": prompt,
            "completion": self.refusal if refuses else self.reply,
            "fields": {name: value for name, value in fields.items() if value},
        }

    def _sealed(self, values: Mapping[str, Any]) -> str:
        label = _first(values, "label").lower()
        if not label and "type" in values and "focus" in values:  # XSTest before it had labels
            label = "harmful" if _first(values, "type").startswith("contrast") else "benign"
        sealed = _SEALED.get(label or self.unlabeled)
        if sealed is None:
            raise UserError(f"{self.label()}: label {label!r} is not one of {', '.join(_SEALED)}.")
        return sealed

    def _side(self, row: Row) -> str:
        drawn = "test" if is_set_apart(row, self.apart, self.test_share, self.seed) else "train"
        return row.fields.get("split", drawn)


def _first(values: Mapping[str, Any], *names: str) -> str:
    """Return the first non-empty value of these columns, or an empty text."""
    texts = (str(values[name]).strip() for name in names if values.get(name) is not None)
    return next(filter(None, texts), "")
