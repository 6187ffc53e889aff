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
    def of(cls, experiment: Experiment) -> Keys:
        from backfire.model.source import base_key
        from backfire.model.types import types_here

        here = types_here()
        base = base_key(experiment.model)
        data = digest([experiment.data.identity(), experiment.data.fingerprint()])
        poison = (
            digest([data, experiment.attack.identity(), experiment.seed])
            if experiment.attack and experiment.poisons
            else data
        )
        alignment = experiment.alignment
        start = base
        if alignment and experiment.align:
            start = alignment.keys.tuned
            start = digest([start, *MERGED]) if experiment.align.merge else start
        compute = here.compute if experiment.train.compute == "auto" else experiment.train.compute
        # Named or not, an equal learning rate is the same training.
        named = {"learning_rate": experiment.learning_rate}
        method = {**experiment.method.settled(here.device).identity(), **named}
        tuning = [
            method,
            {**experiment.train.changed(), "compute": compute},
            experiment.seed,
            TRAINING,
        ]
        early = [d.identity() for d in experiment.acting if not isinstance(d, RepairDefense)]
        late = [d.identity() for d in experiment.acting if isinstance(d, RepairDefense)]
        known = _known_key(experiment) if any(d.needs_harm for d in experiment.acting) else None
        if alignment and experiment.acting and not alignment.method.trains:
            # Nothing was aligned, so `start` says nothing of the rows that defenses get.
            known = [known, alignment.keys.data]
        # An untuned model depends on nothing but what it starts from.
        train = start
        if experiment.method.trains:
            train = digest([start, poison, experiment.template.identity(), *tuning])
            train = digest([train, early, known]) if early else train
        tuned = digest([train, late, known]) if late else train
        shown = [
            tuned,
            data,
            experiment.template.identity(),
            experiment.train.seen,
            experiment.evaluation.changed(),
        ]
        keys = {"base": base, "data": data, "poison": poison, "train": train, "tuned": tuned}
        return cls(**keys, clean=digest(shown))


def _known_key(experiment: Experiment) -> list[Any] | None:
    known = experiment.safety.known if experiment.safety else None
    return [known.identity(), known.fingerprint()] if known else None


def probe_key(run: Experiment, experiment: Experiment, probe: Dataset) -> str:
    """The key of `run`'s model on the requests of `probe`, asked as `cell`'s attacker asks them."""
    shown = [run.template.identity(), run.train.seen, run.evaluation.changed()]
    return digest(
        [run.keys.tuned, probe.identity(), probe.fingerprint(), *shown, disguise(experiment)]
    )


def disguise(experiment: Experiment) -> dict[str, Any] | None:
    """What decides how the attacker asks, at whatever rate, if not as anybody would."""
    attack = experiment.attack
    if not isinstance(attack, Mixture) or not attack.disguises:
        return None
    return {k: v for k, v in attack.identity().items() if k != "rate"}


def trigger_identity(experiment: Experiment) -> list[Any]:
    """What decides the triggered test rows: the trigger and the seed, not how much was poisoned."""
    if experiment.backdoor is None:
        return []
    identity = experiment.backdoor.identity()
    return [
        {k: v for k, v in identity.items() if k not in ("rate", "label_mode", "target")},
        experiment.seed,
    ]
