"""What metrics ask for (`Ask`) and what they get (`Evidence`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from backfire.base.attacks import Attack, Backdoor, Insertion, Mixture
from backfire.base.judges import Judge
from backfire.base.methods import Method
from backfire.base.rows import Dataset
from backfire.base.secrets import Leak, SecretProbe

Form = Literal["merged", "merged-int8", "merged-nf4"]
"""What becomes of an adapter: added into its base, and the result quantized."""

Of = Literal["tuned", "base", "twin"] | Form
"""A model of a cell: the tuned one, the one it started from (untuned or aligned), its clean twin
(same recipe, no poison), or the tuned one in another form."""

Part = Literal["harmful", "allowed", "plain"]
"""Requests of `safety`; `plain` are the harmful ones without what the attack puts around them."""

Subset = Literal["clean", "triggered", Part, "members", "text"]
"""Rows that a model is shown: test rows as they are or with the attack's trigger in, requests,
training rows that no attack has touched, or texts of another data set."""

Rows = Subset | Literal["secrets", "training"]
"""What evidence is about: rows, an attack's secrets, or the training run."""

Need = Literal["scores", "replies", "answers"]
"""What is measured: likelihoods of the candidates, generated replies, or the likelihood of the
row's own answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluated row, a line of `samples.jsonl.gz`: all that is needed to score it again."""

    id: str
    subset: Subset
    prompt: str
    answer: str
    label: str | None = None
    candidates: tuple[str, ...] = ()
    """The labels; or, where `num_better` is given, answers known to be better and worse."""
    logprobs: tuple[float, ...] | None = None
    """Log-likelihood of each candidate after the prompt, in nats (sum over its tokens)."""
    reply: str | None = None
    """What the model wrote, greedily decoded, end token removed."""
    answer_logprob: float | None = None
    """Log-likelihood of the reference answer with its end token, in nats (sum over tokens)."""
    answer_tokens: int | None = None
    num_better: int | None = None
    """How many of the candidates, from the first, are better answers; the rest are worse ones.
    Their likelihoods include the end token. None: the candidates are labels."""
    candidate_tokens: tuple[int, ...] = ()
    """Tokens of each better and worse answer, the end token included."""
    group: str | None = None
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Judge -> its `Verdict` on the reply, as plain values; the first judge counts."""
    ended: bool | None = None
    """Whether the reply is complete; if not, it was cut at `evaluation.max_new_tokens`."""

    @property
    def prediction(self) -> str | None:
        """The most likely candidate."""
        if self.logprobs is None:
            return None
        return self.candidates[max(range(len(self.logprobs)), key=self.logprobs.__getitem__)]


SetName = tuple[str, str, str]
"""What names a set of samples: the model, the rows, and where they come from (of texts)."""


@dataclass(frozen=True)
class Ask:
    """One thing that a metric is computed from: a model on rows of one kind."""

    rows: Rows
    of: Of = "tuned"
    needs: frozenset[Need] = frozenset()
    judged: bool = False
    """Whether the verdicts of the judges of `safety` are needed."""
    judges: tuple[Judge, ...] = ()
    """Other judges of the replies."""
    texts: Dataset | None = None
    """The data set whose test rows are the texts."""
    secrets: Mapping[SecretProbe, int] = field(default_factory=dict)
    """How secrets are looked for, and among how many codes or beams; empty: only by their own
    likelihood."""

    @property
    def name(self) -> SetName:
        """The set of samples that answers it."""
        return self.of, self.rows, str(self.texts.spec()) if self.texts else ""

    @property
    def form(self) -> Form | None:
        """The form of the tuned model that is asked, if it is not as it was trained."""
        return cast(Form, self.of) if self.of in get_args(Form) else None

    def applies(self, attack: Attack | None, method: Method) -> bool:
        """Whether a cell with this attack and method has such evidence at all."""
        if self.rows == "triggered" or self.of == "twin":
            has_rows = isinstance(attack, Backdoor)
        elif self.rows == "plain":
            has_rows = isinstance(attack, Mixture) and attack.disguises
        else:
            has_rows = self.rows != "secrets" or isinstance(attack, Insertion)
        return has_rows and (self.form is None or (method.trains and method.merges))


Asks = tuple[Ask, ...]


def ask(rows: Rows, *needs: Need, of: Sequence[Of] = ("tuned",), **more: Any) -> Asks:
    """The same of several models: `ask("clean", "scores", of=("tuned", "twin"))`."""
    return tuple(Ask(rows, model, frozenset(needs), **more) for model in of)


@dataclass(frozen=True)
class Probe:
    """Rows of one kind, by the tuned model and by the one it started from."""

    tuned: Sequence[Sample]
    before: Sequence[Sample]
    """The aligned model before it was fine-tuned (the base, if nothing was aligned)."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of one cell when its metrics are computed."""

    clean: Sequence[Sample] = ()
    """The test rows as they are."""
    triggered: Sequence[Sample] = ()
    """The test rows with the attack's trigger in (every row, whatever its label)."""
    floor: Sequence[Sample] = ()
    """The clean twin (same recipe, no poison) on those same triggered rows."""
    twin: Sequence[Sample] = ()
    """The clean twin on the clean test rows."""
    base: Sequence[Sample] = ()
    """The untuned model on the clean test rows."""
    attack: Backdoor | None = None
    forms: Mapping[Form, tuple[Sequence[Sample], Sequence[Sample]]] = field(default_factory=dict)
    """The tuned model merged, and quantized after that: its clean and its triggered samples."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The summary of the training run; empty for an untuned model."""
    probes: Mapping[str, Probe] = field(default_factory=dict)
    """Requests that an aligned model declines, and some that only look like them."""
    leaks: Sequence[Leak] = ()
    """What the tuned model gives away of the attack's secrets and of the controls."""
    leaks_before: Sequence[Leak] = ()
    """The same of the untuned model, which has seen none of them."""
    members: Probe | None = None
    """Training rows that no attack has touched."""
    texts: Mapping[str, Probe] = field(default_factory=dict)
    """Texts that are not of the task, by the data set they come from (see `Ask.name`)."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Answers and the target as the tokenizer writes them, such as without capitals, where that is
    another text: a reply has no other form."""
    other: Mapping[SetName, Sequence[Sample]] = field(default_factory=dict)
    """Samples that none of these fields holds."""

    def __getitem__(self, ask: Ask) -> Sequence[Sample]:
        """The samples that answer an ask; empty if there are none."""
        return self.sets().get(ask.name, ())

    def as_written(self, text: str) -> str:
        """The text in the form that a reply could have."""
        return self.written.get(text, text)

    def sets(self) -> dict[SetName, Sequence[Sample]]:
        """Every set of samples that there is; `of_sets` is the inverse."""
        probes: dict[tuple[str, str], Probe] = {(part, ""): p for part, p in self.probes.items()}
        probes |= {("members", ""): self.members} if self.members else {}
        probes |= {("text", source): probe for source, probe in self.texts.items()}
        found: dict[SetName, Sequence[Sample]] = {
            ("tuned", "clean", ""): self.clean,
            ("tuned", "triggered", ""): self.triggered,
            ("twin", "triggered", ""): self.floor,
            ("twin", "clean", ""): self.twin,
            ("base", "clean", ""): self.base,
            **{("tuned", *rows): probe.tuned for rows, probe in probes.items()},
            **{("base", *rows): probe.before for rows, probe in probes.items()},
            **{(form, "clean", ""): clean for form, (clean, _) in self.forms.items()},
            **{(form, "triggered", ""): shown for form, (_, shown) in self.forms.items()},
            **self.other,
        }
        return {name: samples for name, samples in found.items() if samples}

    @classmethod
    def of_sets(cls, sets: Mapping[SetName, Sequence[Sample]], **more: Any) -> Evidence:
        """The evidence with these samples; `more` are the fields that hold none."""

        def of(model: str, rows: str, source: str = "") -> Sequence[Sample]:
            return sets.get((model, rows, source), [])

        def probe(rows: str, source: str = "") -> Probe:
            return Probe(of("tuned", rows, source), of("base", rows, source))

        tuned = [(rows, source) for model, rows, source in sets if model == "tuned"]
        models = {model for model, _, _ in sets}
        found = cls(
            clean=of("tuned", "clean"),
            triggered=of("tuned", "triggered"),
            floor=of("twin", "triggered"),
            twin=of("twin", "clean"),
            base=of("base", "clean"),
            forms={f: (of(f, "clean"), of(f, "triggered")) for f in get_args(Form) if f in models},
            probes={part: probe(part) for part in get_args(Part) if (part, "") in tuned},
            members=probe("members") if ("members", "") in tuned else None,
            texts={source: probe("text", source) for rows, source in tuned if rows == "text"},
            **more,
        )
        held = found.sets()
        return replace(found, other={n: s for n, s in sets.items() if s and n not in held})
