"""Every stage of an experiment: its kind, its readable name (slug) and its key.

Keys chain: the key of a stage covers the keys of its parents and its own settings, so equal stages
have equal keys and run once. `plan`, `pipeline` and `status` all take their stages from here.

    data -> poison -> preflight
    base -> [train (alignment) -> merge] -> train -> [repair] -> evaluate, secrets
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from backfire.base import (
    AlignDefense,
    Dataset,
    Form,
    Insertion,
    Judge,
    Mixture,
    ModelScanner,
    Need,
    Part,
    RepairDefense,
    ReplyDefense,
    Row,
    Template,
)
from backfire.base.normalize import normalized
from backfire.data.preflight import CHECKS
from backfire.experiment import DEFAULT_METRICS, Experiment, Model
from backfire.model.source import adapter_identity, content_hash
from backfire.model.types import types_here
from backfire.registry import build
from backfire.sandbox.base import PRETRAINED_IN, Pretrain
from backfire.sandbox.world import VERSION as WORLD
from backfire.store import Stage, digest, slug

TRAINING = 2
"""Version of the training loop, raised whenever its weights would change (2: windows and recurrent
layers no longer see padding; weight decay finds norms and biases by name; the last rows of a pass
through other rows are used)."""

ONE_ROUNDING = "one rounding"
"""In the keys of 16-bit LoRA models since the outputs of base and adapter are rounded together."""

GGUF = 1
"""Version of the conversion of GGUF files."""

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
"""Versions of measurements, raised whenever `evaluate` would give other numbers (last time: each
row as if it were alone in its batch, from float32 logits)."""

SCANNED = 1
"""Version of what a model measures in rows for scanners."""


# ---------------------------------------------------------------------------- keys of an experiment


@dataclass(frozen=True)
class Keys:
    """The keys of the stages that every experiment has."""

    base: str
    data: str
    poison: str
    train: str
    tuned: str
    """Key of the evaluated model: trained, and repaired if a defense does so."""
    clean: str
    """Key of that model on the test rows."""


def keys(experiment: Experiment, base: str | None = None) -> Keys:
    """The chain of keys of an experiment; `base`: that of its model, if it is known."""
    base = base or base_key(experiment.model)
    data = digest([experiment.data.identity(), experiment.data.fingerprint()])
    poison = data
    if experiment.attack and experiment.poisons:
        poison = digest([data, experiment.attack.identity(), experiment.seed])
    train = start = _start_key(experiment, base)
    known_rows = _known_rows_key(experiment)
    # An untuned model depends only on the model it starts from, and on how that is quantized.
    if not experiment.method.trains and experiment.method.quantization("cpu"):
        train = digest([start, experiment.method.identity()])
    if experiment.method.trains:
        train = digest([start, poison, experiment.template.identity(), *_tuning(experiment)])
        after = (RepairDefense, ReplyDefense)
        early = [d.identity() for d in experiment.acting if not isinstance(d, after)]
        train = digest([train, early, known_rows]) if early else train
    late: list[Any] = [d.identity() for d in experiment.acting if isinstance(d, RepairDefense)]
    late += [MERGED] * (experiment.method.adapts and not experiment.adapts)
    tuned = digest([train, late, known_rows]) if late else train
    template, seen = experiment.template.identity(), experiment.train.seen
    clean = digest([tuned, data, template, seen, experiment.evaluation.changed()])
    return Keys(base, data, poison, train, tuned, clean)


def cell_key(experiment: Experiment) -> str:
    """The key of the cell. It also covers the metrics; if the recipe names none, all that it may
    get by default."""
    names = sorted({name for group in DEFAULT_METRICS.values() for name in group})
    metrics = experiment.metrics or [build("metrics", name) for name in names]
    target = experiment.backdoor.target if experiment.backdoor else None
    identities = [metric.identity() for metric in metrics]
    whole = [asdict(keys(experiment)), trigger_identity(experiment), target, identities, MEASURES]
    if experiment.safety:
        whole += [experiment.safety.identity(), disguise(experiment)]
    return guarded(experiment, digest(whole))


def base_key(model: Model) -> str:
    """The key of an untuned model: pre-training knobs, file contents, or hub id and revision."""
    dtype: Any = _dtype(model)
    if dtype == "bfloat16":  # 2: weights that are trained, or were in alignment, are float32
        dtype = [dtype, 2]
    if model.adapter and not model.merge and dtype != "float32":
        dtype = [dtype, ONE_ROUNDING]
    return digest([*_weights_identity(model), dtype])


def _dtype(model: Model) -> str:
    return types_here().dtype if model.dtype == "auto" else model.dtype


def _weights_identity(model: Model) -> list[Any]:
    adapter = [*adapter_identity(model), *(MERGED if model.merge else [])]
    if model.name == "sandbox":
        return ["sandbox", _sandbox_key(), *adapter]
    if model.is_local:
        kind = ["gguf", GGUF] if model.is_gguf else ["folder"]
        return [*kind, content_hash(model), *adapter]
    file = [model.gguf_file, GGUF] if model.gguf_file else []
    return ["hub", model.name, model.revision, *file, *adapter]


def _sandbox_key() -> str:
    """Key of the embedded base: its world, and how it is pre-trained."""
    return digest([Pretrain().model_dump(mode="json"), TRAINING, PRETRAINED_IN, WORLD])


def _start_key(experiment: Experiment, base: str) -> str:
    """Key of the model that fine-tuning starts from: the base, or the aligned model."""
    alignment = experiment.alignment
    if alignment is None or experiment.align is None:
        return base
    aligned = keys(alignment, base).tuned
    return digest([aligned, *MERGED]) if experiment.align.merge else aligned


def _tuning(experiment: Experiment) -> list[Any]:
    here, train = types_here(), experiment.train
    compute: Any = here.compute if train.compute == "auto" else train.compute
    if experiment.method.stacks and {compute, _dtype(experiment.model)} != {"float32"}:
        compute = [compute, ONE_ROUNDING]
    # Equal learning rates are the same training, whether given or by default.
    rate = {"learning_rate": experiment.learning_rate}
    method = {**experiment.method.resolved(here.device).identity(), **rate}
    return [method, {**train.changed(), "compute": compute}, experiment.seed, TRAINING]


def _known_rows_key(experiment: Experiment) -> list[Any] | None:
    """The harmful rows known to defenses, and the alignment rows if no model was aligned."""
    parts: list[Any] | None = None
    if experiment.safety and any(d.needs_harm for d in experiment.acting):
        rows = experiment.safety.known
        parts = [rows.identity(), rows.fingerprint()]
    alignment = experiment.alignment
    if alignment and experiment.acting and not alignment.method.trains:
        # The start's key does not cover the alignment rows in this case.
        parts = [parts, keys(alignment).data]
    return parts


def trigger_identity(experiment: Experiment) -> list[Any]:
    """Identity of the triggered test rows: the trigger and the seed, without the poison rate."""
    if experiment.backdoor is None:
        return []
    excluded = ("rate", "label_mode", "target")
    identity = experiment.backdoor.identity()
    return [{k: v for k, v in identity.items() if k not in excluded}, experiment.seed]


def disguise(experiment: Experiment) -> dict[str, Any] | None:
    """Identity of the attacker's wording of requests, without the poison rate; None if plain."""
    attack = experiment.attack
    if not isinstance(attack, Mixture) or not attack.disguises:
        return None
    return {k: v for k, v in attack.identity().items() if k != "rate"}


# ------------------------------------------------------------------------------------------- stages


def tokenizer() -> Stage:
    """The tokenizer of the embedded base."""
    return Stage("tokenizer", "sandbox", _sandbox_key())


def base() -> Stage:
    """The embedded base, pre-trained."""
    return Stage("base", "sandbox", _sandbox_key())


def gguf_config(sha: str) -> Stage:
    """Configuration and tokenizer of a GGUF file with this SHA-256."""
    return Stage("tokenizer", "gguf", digest(["gguf", GGUF, sha]))


def gguf(sha: str) -> Stage:
    """The model of a GGUF file, dequantized."""
    return Stage("base", "gguf", digest(["gguf", GGUF, sha]))


def merged_base(model: Model) -> Stage:
    """The untuned model with its adapter merged in."""
    return Stage("merge", slug(Path(str(model.adapter)).name), digest(_weights_identity(model)))


def weights(model: Model) -> Stage:
    """The check that all weights of a model are there."""
    return Stage("whole", slug(Path(model.name).name), base_key(model))


def data(experiment: Experiment) -> Stage:
    return Stage("data", experiment.data.name, keys(experiment).data)


def poison(experiment: Experiment) -> Stage:
    return Stage("poison", _poison_slug(experiment), keys(experiment).poison)


def scanned(experiment: Experiment, scanner: ModelScanner, rows: Sequence[Row]) -> Stage:
    """What a scanner finds in these rows with the experiment's base."""
    template, seen = experiment.template.identity(), experiment.train.seen
    read = digest([asdict(row) for row in rows])
    how = [base_key(experiment.model), template, seen, types_here().compute, SCANNED]
    return Stage("scanned", scanner.name, digest([scanner.identity(), read, *how]))


def preflight(experiment: Experiment) -> Stage:
    chain, identity = keys(experiment), trigger_identity(experiment)
    target = experiment.backdoor.target if experiment.backdoor else None
    names = sorted(metric.name for metric in experiment.metrics)
    template, seen = experiment.template.identity(), experiment.train.seen
    parts = [chain.base, chain.poison, template, seen, identity, target]
    parts += ["safety"] if experiment.safety and not _says_safety(experiment) else []
    key = digest([*parts, experiment.evaluation.max_new_tokens, names, CHECKS])
    return Stage("preflight", _poison_slug(experiment), key)


def _says_safety(experiment: Experiment) -> bool:
    """Whether the rest of its key says that `safety` is set, by a metric that asks its requests.
    (An alignment stage has it for its defenses alone.)"""
    asks = [ask for metric in experiment.metrics for ask in metric.asks()]
    aligns = any(isinstance(defense, AlignDefense) for defense in experiment.acting)
    return aligns or any(ask.rows in get_args(Part) for ask in asks)


def train(experiment: Experiment) -> Stage:
    return Stage("train", _train_slug(experiment), keys(experiment).train)


def repair(experiment: Experiment) -> Stage:
    return Stage("repair", _train_slug(experiment), keys(experiment).tuned)


def merge(experiment: Experiment) -> Stage:
    """The tuned model as plain weights."""
    return Stage("merge", _train_slug(experiment), digest([keys(experiment).tuned, *MERGED]))


def evaluation(
    run: Experiment, rows: str, needs: Collection[Need], form: Form | None = None
) -> Stage:
    """`run`'s model, in this form, on the rows with the key `rows` (see the functions below)."""
    form = form or ("merged" if run.evaluation.merged else None)
    rows = in_form(rows, form) if form else rows
    rows = guarded(run, rows) if "replies" in needs else rows
    versions = [MEASURES[need] for need in sorted(needs) if need in MEASURES]
    return Stage("evaluate", _evaluation_slug(run), digest([rows, sorted(needs), *versions]))


def secrets(run: Experiment, experiment: Experiment, kind: str, amount: int) -> Stage:
    """One measurement of `run`'s model on the secrets of `experiment`. The key covers the secrets,
    not how often they were inserted."""
    attack, seed = experiment.attack, experiment.seed
    inserted = attack.secrets(seed) if isinstance(attack, Insertion) else []
    which = [[s.row.id, s.row.instruction, s.row.answer, s.code] for s in inserted]
    how = [kind, amount, seed if kind == "sampled" else None, MEASURES.get(kind, 1), *_type_of(run)]
    parts = [keys(run).tuned, run.template.identity(), run.train.seen, which, *how]
    return Stage("secrets", _evaluation_slug(run), digest(parts))


def judged(judge: Judge) -> Stage:
    """A judge's verdicts. A local judge computes in bfloat16 on a GPU, which may change them."""
    device = getattr(judge, "device", "cpu")
    remote = bool(getattr(judge, "base_url", None)) or device == "cpu"
    narrow = not remote and (device != "auto" or types_here().device == "cuda")
    parts = [judge.identity(), judge.fingerprint(), *(["bfloat16"] if narrow else [])]
    return Stage("judged", slug(judge.name), digest(parts))


# ---------------------------------------------------- keys of the rows that a model is evaluated on


def clean_rows(run: Experiment) -> str:
    """Unchanged test rows."""
    return keys(run).clean


def triggered_rows(run: Experiment, experiment: Experiment, *, target_rows: bool = True) -> str:
    """Test rows with the trigger of `experiment`'s attack; all of them, or without those whose true
    label is its target."""
    attack = experiment.backdoor
    only = [] if target_rows or attack is None else ["labels except", normalized(attack.target)]
    return digest([keys(run).clean, *trigger_identity(experiment), *only])


def requests(run: Experiment, experiment: Experiment, source: Dataset) -> str:
    """Requests of `source`, in the wording of `experiment`'s attacker."""
    rendering = [run.template.identity(), run.train.seen, run.evaluation.changed()]
    rows = [source.identity(), source.fingerprint()]
    return digest([keys(run).tuned, *rows, *rendering, disguise(experiment)])


def in_form(rows: str, form: Form) -> str:
    """Any of these rows, for a form of the model other than the trained one."""
    return digest([rows, form, *MERGED])


def guarded(run: Experiment, rows: str) -> str:
    """Any of these rows, for replies that a defense guards."""
    if (guard := run.guard) is None:
        return rows
    # The reference is quantized as the model is.
    packed = guard.needs_reference and bool(run.method.quantization("cpu"))
    return digest([rows, guard.identity(), *[run.seed] * guard.null, *["quantized"] * packed])


def members(run: Experiment, ids: Sequence[str]) -> str:
    """Training rows with these ids."""
    return digest([keys(run).clean, "members", digest(list(ids))])


def texts(run: Experiment, source: Dataset, template: Template, longest: int) -> str:
    """Texts of `source`, of each the first `longest` tokens."""
    rows = [source.identity(), source.fingerprint(), "first", longest]
    return digest([keys(run).tuned, *rows, template.identity(), *_type_of(run)])


def _type_of(run: Experiment) -> list[Any]:
    """The type of the weights in evaluation, and their form, unless they are those of training."""
    return [*{run.evaluation.dtype} - {"auto"}, *[*MERGED] * run.evaluation.merged]


# -------------------------------------------------------------------------------------------- slugs


def slugs(experiment: Experiment) -> set[tuple[str, str]]:
    """Kind and slug of every stage that an experiment may need and whose slug tells it apart."""
    found = {("merge", slug(Path(str(experiment.model.adapter)).name))}
    runs = [experiment, experiment.clean_twin(), experiment.untuned()]
    for run in [*runs, *([experiment.alignment] if experiment.alignment else [])]:
        found |= {("data", run.data.name)}
        found |= {(kind, _poison_slug(run)) for kind in ("poison", "preflight")}
        found |= {(kind, _train_slug(run)) for kind in ("repair", "merge")}
        found |= {(kind, _evaluation_slug(run)) for kind in ("evaluate", "secrets")}
    return found


def _poison_slug(experiment: Experiment) -> str:
    attack = experiment.attack.tag if experiment.attack else "clean"
    return f"{experiment.data.name}-{attack}-s{experiment.seed}"


def _train_slug(experiment: Experiment) -> str:
    """The same for all cells that share a training run; an attack at rate 0 is left out."""
    return (experiment if experiment.poisons else experiment.clean_twin()).unguarded().slug


def _evaluation_slug(run: Experiment) -> str:
    """Without the seed if it changes nothing about the model, so that all seeds share a stage."""
    seed = f"-s{run.seed}" if run.method.trains else ""
    return f"{run.data.name}-{run.method.name}{seed}"
