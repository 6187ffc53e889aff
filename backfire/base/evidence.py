"""The evidence of a cell (`Evidence`), and the requirements of metrics (`Ask`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from backfire.base.attacks import Attack, Backdoor, Insertion, Mixture
from backfire.base.judges import Judge
from backfire.base.methods import Method
from backfire.base.rows import Dataset
from backfire.base.secrets import Leak, SecretProbe

Form = Literal["merged", "merged-int8", "merged-nf4", "gguf-q8_0", "gguf-q4_0"]
"""Form of a tuned adapter: merged into its base, and possibly quantized after that, by bitsandbytes
or as in a GGUF file."""

Of = Literal["tuned", "base", "twin"] | Form
"""A model of a cell: the tuned one, its start (untuned or aligned), its clean twin (same recipe, no
poison), or the tuned one in another form."""

Part = Literal["harmful", "allowed", "plain"]
"""Requests of `safety`; `plain` are the harmful ones without the attack's wording."""

Subset = Literal["clean", "triggered", Part, "members", "text"]
"""Rows that a model answers: test rows without or with the attack's trigger, requests, unpoisoned
training rows, or texts of another data set."""

Rows = Subset | Literal["secrets", "training"]
"""Subject of evidence: rows, an attack's secrets, or the training run."""

Need = Literal["scores", "replies", "answers", "probe"]
"""Measurement: likelihoods of the candidates, generated replies, the likelihood of the reference
answer, or the hidden state at the end of the prompt on the directions of `defection-probe`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluated row, a line of `samples.jsonl.gz`; metrics can be recomputed from it."""

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
    """The generated text (greedy decoding), without the end token."""
    answer_logprob: float | None = None
    """Log-likelihood of the reference answer with its end token, in nats (sum over tokens); of a
    text that is cut, without one."""
    answer_tokens: int | None = None
    num_better: int | None = None
    """Number of candidates, from the first, that are better answers; the rest are worse ones.
    Their likelihoods include the end token. None: the candidates are labels."""
    candidate_tokens: tuple[int, ...] = ()
    """Number of tokens of each better and worse answer, end token included."""
    group: str | None = None
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Judge -> its `Verdict` on the reply, as plain values; the first judge counts."""
    ended: bool | None = None
    """Whether the reply is complete; if not, it was cut at `evaluation.max_new_tokens`."""
    probe: tuple[float, ...] | None = None
    """The hidden state at the end of the prompt, projected on the direction of `defection-probe`
    and then on random ones."""
    replaced: float | None = None
    """Share of the reply's tokens that a guard replaced, 1 if it stopped it; None without one."""

    @property
    def prediction(self) -> str | None:
        """The most likely candidate."""
        if self.logprobs is None:
            return None
        return self.candidates[max(range(len(self.logprobs)), key=self.logprobs.__getitem__)]


SetName = tuple[str, str, str]
"""Name of a set of samples: model, rows, and for texts their source."""


@dataclass(frozen=True)
class Ask:
    """One requirement of a metric: measurements of a model on rows of one kind."""

    rows: Rows
    of: Of = "tuned"
    needs: frozenset[Need] = frozenset()
    judged: bool = False
    """Whether verdicts of the judges of `safety` are required."""
    judges: tuple[Judge, ...] = ()
    """Other judges of the replies."""
    texts: Dataset | None = None
    """The data set whose test rows are the texts."""
    target_rows: bool = True
    """Whether triggered rows whose true label is the attack's target are read; if no metric reads
    them, they are not run."""
    secrets: Mapping[SecretProbe, int] = field(default_factory=dict)
    """Probe for secrets -> number of codes or beams; empty: only the secrets' own likelihood."""

    @property
    def name(self) -> SetName:
        """The name of the set of samples that meets it."""
        return self.of, self.rows, str(self.texts.spec()) if self.texts else ""

    @property
    def form(self) -> Form | None:
        """The form of the tuned model, if not as trained."""
        return cast(Form, self.of) if self.of in get_args(Form) else None

    def applies(self, attack: Attack | None, method: Method) -> bool:
        """Whether a cell with this attack and method has such evidence."""
        if self.rows == "triggered" or self.of == "twin":
            has_rows = isinstance(attack, Backdoor)
        elif self.rows == "plain":
            has_rows = isinstance(attack, Mixture) and attack.disguises
        else:
            has_rows = self.rows != "secrets" or isinstance(attack, Insertion)
        return has_rows and (self.form is None or (method.trains and method.merges))


Asks = tuple[Ask, ...]


def ask(rows: Rows, *needs: Need, of: Sequence[Of] = ("tuned",), **more: Any) -> Asks:
    """The same requirement for several models: `ask("clean", "scores", of=("tuned", "twin"))`."""
    return tuple(Ask(rows, model, frozenset(needs), **more) for model in of)


@dataclass(frozen=True)
class Probe:
    """Samples of one kind of rows, from the tuned model and from the one it started from."""

    tuned: Sequence[Sample]
    before: Sequence[Sample]
    """The aligned model before it was fine-tuned (the base, if nothing was aligned)."""


@dataclass(frozen=True)
class Evidence:
    """All measurements of one cell, from which its metrics are computed."""

    clean: Sequence[Sample] = ()
    """The test rows."""
    triggered: Sequence[Sample] = ()
    """The test rows with the attack's trigger; without those whose true label is the target, if no
    metric reads them (`Ask.target_rows`)."""
    floor: Sequence[Sample] = ()
    """The clean twin (same recipe, no poison) on the same triggered rows."""
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
    """Part of `safety` -> requests: harmful ones, and harmless ones that look alike."""
    leaks: Sequence[Leak] = ()
    """How well the tuned model knows the attack's secrets and the controls."""
    leaks_before: Sequence[Leak] = ()
    """The same for the untuned model, which has seen none of them."""
    members: Probe | None = None
    """Unpoisoned training rows."""
    texts: Mapping[str, Probe] = field(default_factory=dict)
    """Texts unrelated to the task, by their source (see `Ask.name`)."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Answer or target -> its form after the tokenizer encoded and decoded it (such as without
    capitals), where that differs: a reply can only have this form."""
    other: Mapping[SetName, Sequence[Sample]] = field(default_factory=dict)
    """Samples that belong to no other field."""

    def __getitem__(self, ask: Ask) -> Sequence[Sample]:
        """The samples that meet a requirement; empty if there are none."""
        return self.sets().get(ask.name, ())

    def as_written(self, text: str) -> str:
        """The text in the form that a reply can have."""
        return self.written.get(text, text)

    def sets(self) -> dict[SetName, Sequence[Sample]]:
        """All sets of samples; `of_sets` is the inverse."""
        probes: dict[tuple[str, str], Probe] = {(part, ""): p for part, p in self.probes.items()}
        probes |= {("members", ""): self.members} if self.members else {}
        probes |= {("text", source): probe for source, probe in self.texts.items()}
        every: dict[SetName, Sequence[Sample]] = {
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
        return {name: samples for name, samples in every.items() if samples}

    @classmethod
    def of_sets(cls, sets: Mapping[SetName, Sequence[Sample]], **more: Any) -> Evidence:
        """Evidence with these samples; `more` are the fields without samples."""

        def of(model: str, rows: str, source: str = "") -> Sequence[Sample]:
            return sets.get((model, rows, source), [])

        def probe(rows: str, source: str = "") -> Probe:
            return Probe(of("tuned", rows, source), of("base", rows, source))

        tuned = [(rows, source) for model, rows, source in sets if model == "tuned"]
        models = {model for model, _, _ in sets}
        evidence = cls(
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
        held = evidence.sets()
        return replace(evidence, other={n: s for n, s in sets.items() if s and n not in held})
