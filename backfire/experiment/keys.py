"""Keys chain: each covers its parents and the knobs of its own stage."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from backfire.base import Config, Dataset, Mixture, RepairDefense

if TYPE_CHECKING:
    from backfire.experiment.experiment import Experiment

TRAINING = 2
"""Version of the training loop, raised whenever it would give other weights (2: windows and
recurrent layers no longer see padding; weight decay knows norms and biases by name; the last rows
of a pass through other rows are used)."""


def digest(value: Any, length: int = 12) -> str:
    """Short hash of a plain value; dict order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[
        :length
    ]


def slug(text: str) -> str:
    """A safe file name of at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80] or "x"


MERGED = ("merged", 2)
"""How adapters are merged, and its version."""

MEASURES = {
    "scores": 2,
    "replies": 3,
    "answers": 2,
    "itself": 2,
    "exact": 3,
    "sampled": 3,
    "beams": 2,
}
"""Versions of what is measured, raised whenever `evaluate` would give other numbers (the last time:
each row as if it were alone, from float32 logits)."""


class Keys(Config):
    """One key a stage; see `docs/concepts.md` for what each covers."""

    base: str
    data: str
    poison: str
    train: str
    tuned: str
    clean: str

    @classmethod
    def of(cls, cell: Experiment) -> Keys:
        from backfire.model.source import base_key
        from backfire.model.types import types_here

        here = types_here()
        base = base_key(cell.model)
        data = digest([cell.data.identity(), cell.data.fingerprint()])
        poison = (
            digest([data, cell.attack.identity(), cell.seed])
            if cell.attack and cell.poisons
            else data
        )
        alignment = cell.alignment
        start = base
        if alignment and cell.align:
            start = alignment.keys.tuned
            start = digest([start, *MERGED]) if cell.align.merge else start
        compute = here.compute if cell.train.compute == "auto" else cell.train.compute
        # Named or not, an equal learning rate is the same training.
        named = {"learning_rate": cell.learning_rate}
        method = {**cell.method.settled(here.device).identity(), **named}
        tuning = [method, {**cell.train.changed(), "compute": compute}, cell.seed, TRAINING]
        early = [d.identity() for d in cell.acting if not isinstance(d, RepairDefense)]
        late = [d.identity() for d in cell.acting if isinstance(d, RepairDefense)]
        known = _known_key(cell) if any(d.needs_harm for d in cell.acting) else None
        if alignment and cell.acting and not alignment.method.trains:
            # Nothing was aligned, so `start` says nothing of the rows that defenses get.
            known = [known, alignment.keys.data]
        # An untuned model depends on nothing but what it starts from.
        train = start
        if cell.method.trains:
            train = digest([start, poison, cell.template.identity(), *tuning])
            train = digest([train, early, known]) if early else train
        tuned = digest([train, late, known]) if late else train
        shown = [
            tuned,
            data,
            cell.template.identity(),
            cell.train.seen,
            cell.evaluation.changed(),
        ]
        keys = {"base": base, "data": data, "poison": poison, "train": train, "tuned": tuned}
        return cls(**keys, clean=digest(shown))


def _known_key(cell: Experiment) -> list[Any] | None:
    known = cell.safety.known if cell.safety else None
    return [known.identity(), known.fingerprint()] if known else None


def probe_key(run: Experiment, cell: Experiment, probe: Dataset) -> str:
    """The key of `run`'s model on the requests of `probe`, asked as `cell`'s attacker asks them."""
    shown = [run.template.identity(), run.train.seen, run.evaluation.changed()]
    return digest([run.keys.tuned, probe.identity(), probe.fingerprint(), *shown, disguise(cell)])


def disguise(cell: Experiment) -> dict[str, Any] | None:
    """What decides how the attacker asks, at whatever rate, if not as anybody would."""
    attack = cell.attack
    if not isinstance(attack, Mixture) or not attack.disguises:
        return None
    return {k: v for k, v in attack.identity().items() if k != "rate"}


def trigger_identity(cell: Experiment) -> list[Any]:
    """What decides the triggered test rows: the trigger and the seed, not how much was poisoned."""
    if cell.backdoor is None:
        return []
    identity = cell.backdoor.identity()
    return [
        {k: v for k, v in identity.items() if k not in ("rate", "label_mode", "target")},
        cell.seed,
    ]
