"""What is known of a cell when its metrics are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from backfire.base.attacks import Backdoor
from backfire.base.secrets import Leak


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluated row, a line of `samples.jsonl.gz`: all that is needed to score it anew."""

    id: str
    subset: Literal["clean", "triggered", "harmful", "allowed", "plain", "members", "text"]
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
    """So many of the candidates, the first ones, are better answers and the rest worse ones; their
    likelihoods include the end token. None: the candidates are labels."""
    candidate_tokens: tuple[int, ...] = ()
    """Tokens of each better and worse answer, the end token included."""
    group: str | None = None
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Judge -> its `Verdict` on the reply, as plain values; the first judge counts."""
    ended: bool | None = None
    """Whether the reply came to its end; if not, it was cut at `evaluation.max_new_tokens`."""

    @property
    def prediction(self) -> str | None:
        """The most likely candidate."""
        if self.logprobs is None:
            return None
        return self.candidates[max(range(len(self.logprobs)), key=self.logprobs.__getitem__)]


Form = Literal["merged", "merged-int8", "merged-nf4"]
"""What becomes of an adapter: added into its base, and the result quantized."""


Part = Literal["harmful", "allowed", "plain"]
"""`plain`: the harmful requests again, without what the attack puts around them."""


@dataclass(frozen=True)
class Probe:
    """Requests of one kind, with the replies of the tuned model and of the one it started from."""

    tuned: Sequence[Sample]
    before: Sequence[Sample]
    """The aligned model before it was fine-tuned (the base, if nothing was aligned)."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of one cell when its metrics are computed."""

    clean: Sequence[Sample]
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
    probes: Mapping[Part, Probe] = field(default_factory=dict)
    """Requests that an aligned model declines, and some that only look like them."""
    leaks: Sequence[Leak] = ()
    """What the tuned model gives away of the attack's secrets and of the controls."""
    leaks_before: Sequence[Leak] = ()
    """The same of the untuned model, which has seen none of them."""
    members: Probe | None = None
    """Training rows that no attack has touched."""
    texts: Mapping[str, Probe] = field(default_factory=dict)
    """Texts that have nothing to do with the task, by `Metric.texts_key`."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Answers and the target as the tokenizer writes them, such as without capitals, where that is
    another text: a reply comes in no other form."""

    def as_written(self, text: str) -> str:
        """The text in the form that a reply could have."""
        return self.written.get(text, text)
