"""The settings of one cell of the matrix."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from backfire.base import (
    AlignDefense,
    Attack,
    Backdoor,
    Component,
    Config,
    DataDefense,
    Dataset,
    Defense,
    Judge,
    Method,
    Metric,
    Poison,
    RepairDefense,
    ReplyDefense,
    Row,
    Template,
)
from backfire.errors import UserError, shortened
from backfire.experiment.settings import (
    Align,
    Defenses,
    Evaluation,
    Safety,
    Train,
    component,
    once_each,
)
from backfire.model.count import num_weights
from backfire.model.settings import Model
from backfire.registry import build, find
from backfire.store import slug

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "labeled": ("accuracy", "f1", "auc", "confusion"),
    "free": ("exact-match", "perplexity"),
    "attacked": ("attack-success", "false-trigger", "clean-accuracy"),
    "attacked_free": ("attack-success",),
}
"""Metrics of a recipe that names none, by task."""


def _model(spec: Any) -> Any:
    spec = {"name": spec} if isinstance(spec, str) else spec
    return Model.make(spec) if isinstance(spec, dict) else spec


def _attack(spec: Any) -> Any:
    if spec in (None, "none", {"name": "none"}):
        return None
    if isinstance(spec, dict) and spec.get("name") == "none":
        knobs = ", ".join(sorted(map(str, set(spec) - {"name"})))
        raise UserError(
            f"attack 'none' has no settings, but these are set: {shortened(knobs)}. An axis that "
            "sets one is removed by an edit, as in matrix.attack.rate=null."
        )
    return build("attacks", spec)


class Experiment(Config):
    """One cell: attack x method x defense x seed on one model and one data set."""

    model: Annotated[Model, BeforeValidator(_model)] = Model()
    """`sandbox`, a folder, a GGUF file or a hub id; or {name, revision, gguf_file, adapter, dtype
    ...}."""
    data: SerializeAsAny[Annotated[Dataset, component("datasets")]]
    """The rows: a data set by name, or {name, ...settings}."""
    template: SerializeAsAny[Annotated[Template, component("templates")]] = Field(
        default="raw", validate_default=True
    )  # type: ignore[assignment]
    """The prompt template, in training and evaluation."""
    attack: SerializeAsAny[Annotated[Attack | None, BeforeValidator(_attack)]] = None
    """The attack on the training rows: by name, or {name, rate, ...}; or `none`."""
    method: SerializeAsAny[Annotated[Method, component("methods")]] = Field(
        default="full", validate_default=True
    )  # type: ignore[assignment]
    """The fine-tuning method; `none` leaves the model unchanged."""
    align: Annotated[
        Align | None, BeforeValidator(lambda v: Align.make(v) if isinstance(v, dict) else v)
    ] = None
    """An alignment stage before fine-tuning, shared by all cells with equal settings."""
    defense: Defenses = ()
    """The defense: by name, or {name, ...}, or a list of several in their order."""
    safety: Annotated[
        Safety | None, BeforeValidator(lambda v: Safety.make(v) if isinstance(v, dict) else v)
    ] = None
    """Data and judges that measure harm; required by metrics such as harmful-score."""
    train: Annotated[
        Train, BeforeValidator(lambda v: Train.make(v) if isinstance(v, dict) else v)
    ] = Train()
    """Optimization: epochs, batch_size, schedule ..."""
    evaluation: Annotated[
        Evaluation, BeforeValidator(lambda v: Evaluation.make(v) if isinstance(v, dict) else v)
    ] = Evaluation()
    """Decoding of replies."""
    metrics: tuple[SerializeAsAny[Annotated[Metric, component("metrics")]], ...] = ()
    """The metrics; by default those of the task."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Draws the poisoned rows, the row order, the initial adapter and the dropout."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_metric(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("metrics")
    @classmethod
    def _once_each(cls, value: tuple[Metric, ...]) -> tuple[Metric, ...]:
        return once_each(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        for defense in self.defense:
            defense.suits(aligned=self.align is not None, harm=self.safety is not None)
            writes = isinstance(defense, DataDefense) and defense.writes_system
            if writes and self.template.leaves_out(Row("", "", system="A system prompt.")):
                raise UserError(
                    f"{defense.label()} writes a system prompt, which the template leaves out; set "
                    "template.system to merge, or the defense's part to instruction."
                )
        if sum(isinstance(defense, ReplyDefense) for defense in self.defense) > 1:
            raise UserError("A cell has at most one defense that guards replies.")
        if self.align and not self.align.method.trains:
            for defense in self.defense:
                if isinstance(defense, AlignDefense):
                    raise UserError(
                        f"{defense.label()} acts in the alignment stage, but align.method "
                        f"'{self.align.method.name}' trains nothing."
                    )
        stays = self.align and self.align.method.adapts and not self.align.merge
        below = self.align.method if self.align and stays else None
        repairs = [defense for defense in self.defense if isinstance(defense, RepairDefense)]
        for place, repair in enumerate(repairs if self.method.trains else ()):
            repair.fits(self.method, below)
            merging = next((other for other in repairs[:place] if other.merges), None)
            if self.method.adapts and merging and not repair.merges:
                raise UserError(
                    f"{repair.label()} repairs an adapter, and {merging.label()} merges it; list "
                    f"'{merging.name}' last."
                )
        if below and self.method.trains and not self.method.stacks:
            raise UserError(
                f"method '{self.method.name}' cannot train on top of the alignment's adapter; set "
                "align.merge: true."
            )
        if self.evaluation.merged:
            self._check_merged()
        return self

    def _check_merged(self) -> None:
        """Check that merging for the evaluation changes nothing but rounding."""
        method = self.method
        if method.trains and not method.merges:
            raise UserError(
                f"evaluation.merged: an adapter of method '{method.name}' cannot be merged."
            )
        if method.quantization("cpu"):
            raise UserError(
                f"evaluation.merged: method '{method.name}' quantizes the base, and merged weights "
                "are not quantized; the metric parity compares the two."
            )
        if form := next((a.form for metric in self.metrics for a in metric.asks() if a.form), None):
            raise UserError(
                f"evaluation.merged: a metric compares the model as trained with its form {form}; "
                "leave one of the two out."
            )

    @model_validator(mode="after")
    def _merged_if_needed(self) -> Experiment:
        """The same, with the model's adapter merged into it if what follows needs plain weights."""
        late = any(isinstance(defense, RepairDefense) for defense in self.defense)
        plain = self.method.trains and (late or not self.method.stacks)
        if not self.model.is_adapted or not (self.align or plain):
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"merge": True})})

    @classmethod
    def place(cls) -> str:
        return ""

    def spec(self) -> dict[str, Any]:
        """A recipe that gives exactly this cell."""
        return {
            "model": self.model.spec(),
            "data": self.data.spec(),
            "template": self.template.spec(),
            "attack": self.attack.spec() if self.attack else "none",
            "method": self.method.spec(),
            "align": self.align.spec() if self.align else None,
            "defense": [defense.spec() for defense in self.defense] or "none",
            "safety": self.safety.spec() if self.safety else None,
            "train": self.train.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
            "metrics": [metric.spec() for metric in self.metrics],
            "seed": self.seed,
        }

    def resolved(self) -> dict[str, Any]:
        """`spec` with every knob of every component, including defaults."""

        def full(part: Component | None) -> Any:
            return {"name": part.name, **part.model_dump(mode="json")} if part else "none"

        parts = {
            name: full(getattr(self, name)) for name in ("data", "template", "attack", "method")
        }
        metrics = [full(metric) for metric in self.metrics]
        settings = {**self.spec(), "model": self.model.model_dump(mode="json"), "metrics": metrics}
        settings |= {**parts, "method": {**parts["method"], "learning_rate": self.learning_rate}}
        if self.alignment and self.align:
            method = {**full(self.align.method), "learning_rate": self.alignment.learning_rate}
            settings["align"] = {**settings["align"], "method": method}
        return settings

    def versions(self) -> dict[str, dict[str, int]]:
        """Kind -> component -> version of its behavior, of every component of the cell."""
        parts: list[Component | None] = [self.data, self.template, self.attack, self.method]
        parts += [*self.defense, *self.metrics]
        parts += [self.align.data, self.align.method] if self.align else []
        if self.safety:
            safety = self.safety
            parts += [safety.harmful, safety.allowed, safety.known, *safety.judges]
        for ask in (ask for metric in self.metrics for ask in metric.asks()):
            parts += [ask.texts, *ask.judges]
        found: dict[str, dict[str, int]] = {}
        for part in filter(None, parts):
            found.setdefault(part.kind, {})[part.name] = part.version
        return found

    @property
    def learning_rate(self) -> float | None:
        """AdamW's peak learning rate: the given one, or the default for the size of the base; None
        if the method trains nothing."""
        if not self.method.trains:
            return None
        is_given = self.method.learning_rate is not None
        return self.method.rate_for(None if is_given else num_weights(self.model))

    @property
    def rate(self) -> float:
        return self.attack.rate if isinstance(self.attack, Poison) else 0.0

    @property
    def backdoor(self) -> Backdoor | None:
        """The attack if it is a backdoor, which needs a clean twin and triggered rows."""
        return self.attack if isinstance(self.attack, Backdoor) else None

    @property
    def judges(self) -> list[Judge]:
        """The judges of its metrics, then those of harm."""
        judges = [judge for metric in self.metrics for judge in metric.judges]
        return [*judges, *(self.safety.judges if self.safety else ())]

    @property
    def adapts(self) -> bool:
        """Whether its tuned model is an adapter: it is none where a repair merges it."""
        merges = any(isinstance(d, RepairDefense) and d.merges for d in self.defense)
        return self.method.trains and self.method.adapts and not merges

    @property
    def poisons(self) -> bool:
        """Whether any training row is changed or added."""
        return self.attack is not None and self.attack.poisons

    @property
    def defense_name(self) -> str:
        """`lisa`, `lisa (null)`, `safe-mix + lisa`, or `none`."""
        names = [f"{d.name} (null)" if d.null else d.name for d in self.defense]
        return " + ".join(names) or "none"

    @property
    def acting(self) -> tuple[Defense, ...]:
        """The defenses that act in fine-tuning or after it, without those of the alignment."""
        if self.align is None:
            return self.defense
        return tuple(d for d in self.defense if not isinstance(d, AlignDefense))

    @property
    def guard(self) -> ReplyDefense | None:
        """The defense that guards the model's replies."""
        return next((d for d in self.defense if isinstance(d, ReplyDefense)), None)

    def unguarded(self) -> Experiment:
        """The same cell without it: the model is the same."""
        kept = tuple(d for d in self.defense if not isinstance(d, ReplyDefense))
        return self.model_copy(update={"defense": kept})

    @property
    def alignment(self) -> Experiment | None:
        """The alignment stage as a separate experiment, whose tuned model is the aligned model."""
        if self.align is None:
            return None
        part = self.align
        defenses = tuple(d for d in self.defense if isinstance(d, AlignDefense))
        seed = self.seed if defenses else 0  # a defense is sampled by one model per seed
        changes = {
            "data": part.data,
            "attack": None,
            "method": part.method,
            "align": None,
            "defense": defenses,
            "safety": self.safety if any(d.needs_harm for d in defenses) else None,
            "train": part.train,
            "evaluation": Evaluation(),
            "metrics": (),
            "seed": seed if part.seed is None else part.seed,
        }
        return self.model_copy(update=changes)

    def clean_twin(self) -> Experiment:
        """The same cell without poison: the clean-model baseline of attack success."""
        return self.model_copy(update={"attack": None})

    def untuned(self) -> Experiment:
        """The same cell without fine-tuning: its base or aligned model."""
        none = find("methods", "none").make({})
        kept = tuple(d for d in self.defense if isinstance(d, AlignDefense)) if self.align else ()
        return self.model_copy(update={"attack": None, "method": none, "defense": kept})

    def with_metrics(self, *, labeled: bool) -> Experiment:
        """The cell with its metrics, or the default metrics of its task if it names none."""
        if self.metrics:
            return self
        names = DEFAULT_METRICS["labeled" if labeled else "free"]
        if self.backdoor:
            names += DEFAULT_METRICS["attacked" if labeled else "attacked_free"]
        metrics = tuple(build("metrics", name) for name in names)
        return self.model_copy(update={"metrics": metrics})

    @property
    def slug(self) -> str:
        """A readable name, such as `badnets-0.05-lora-s0`."""
        attack = self.attack.tag if self.attack else "clean"
        names = [attack, self.method.name, *(d.name for d in self.defense)]
        null = ["null"] if any(d.null for d in self.defense) else []
        return slug("-".join([self.data.name, *names, *null, f"s{self.seed}"]))
