"""`backfire doctor RECIPE`: whether a recipe fits this machine, and how long it takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from backfire.commands.asking import as_cell, measures
from backfire.commands.estimate import (
    amount,
    cost,
    describe_cost,
    method_key,
    model_folder,
    rows_by_key,
    rows_key,
    runs_of,
)
from backfire.commands.memory import Device, Memory, Size, memory, size
from backfire.commands.workers import TIGHT, workers_by_device
from backfire.data.weights import is_bare
from backfire.experiment import Experiment, Machine
from backfire.launch.resolve import resolve_auto, types_of
from backfire.model.count import num_weights
from backfire.model.types import Types, gpu_bytes
from backfire.recipe import Recipe
from backfire.registry import build
from backfire.resources import ram_bytes
from backfire.store import Store
from backfire.text import count, listing

if TYPE_CHECKING:
    import torch

SHARE = 0.45
"""Speed of training all weights relative to large matrix products: 0.25 to 0.55 was measured on
CPUs, 0.49 at 135M weights."""
CARDS = (24e9, 40e9, 80e9)
"""Memory of common GPUs: RTX 3090 and 4090, A100, A100 and H100."""
_LARGE = 1e9  # weights from which a model is meant for a GPU
_NAMED = ("rank", "length", "layers", "dora", "dtype")  # knobs that change a method's memory


class Forecast:
    """The memory of a recipe's cells on one kind of device."""

    def __init__(self, recipe: Recipe, types: Types) -> None:
        self.recipe, self.store = resolve_auto(recipe, types), Store()
        self.device: Device = types.device
        self.cells = [*self.recipe.cells, *runs_of(self.recipe)]
        self.rows = rows_by_key(self.cells, self.store)
        self.sizes: dict[str, Size | None] = {}

    def size(self, experiment: Experiment) -> Size | None:
        """The size of its model with its method; None without a config.json on this machine."""
        key = method_key(experiment)
        if key not in self.sizes:
            folder = model_folder(experiment.model, self.store)
            here = experiment.model.name == "sandbox" or (
                folder and (folder / "config.json").is_file()
            )
            self.sizes[key] = size(experiment, folder) if here else None
        return self.sizes[key]

    def memory(self, experiment: Experiment, machine: Machine | None = None) -> Memory | None:
        """Peak memory of a cell; None if the size of its model is unknown."""
        counts, parts = self.size(experiment), [experiment]
        if experiment.alignment and any(d.needs_alignment for d in experiment.acting):
            parts.append(experiment.alignment)  # its rows are trained on too
        rows = [self.rows.get(rows_key(part)) for part in parts]
        if counts is None:
            return None
        need = memory(experiment, counts, rows, self.device, machine)
        return replace(need, asked=self._asked(experiment))

    def _asked(self, experiment: Experiment) -> float:
        """Peak memory while its base is asked about the training rows; 0 if it is not."""
        if not measures(experiment):
            return 0.0
        rows = self.rows.get(rows_key(experiment))
        asked = as_cell(experiment, rows)
        asked = asked.model_copy(update={"method": asked.method.resolved(self.device)})
        counts = self.size(asked)
        return memory(asked, counts, [rows], self.device).total if counts else 0.0

    def largest(self, machine: Machine | None = None) -> Iterator[tuple[Experiment, Memory | None]]:
        """The cell that needs most memory, for each model, method and defense."""
        kinds: dict[str, dict[str, Experiment]] = {}
        for cell in self.cells:
            kind = [method_key(cell), cell.defense_name, sorted(measures(cell))]
            alike = kinds.setdefault(str(kind), {})
            alike.setdefault(str([rows_key(cell), cell.train, cell.evaluation]), cell)
        for alike in kinds.values():
            needs = [(cell, self.memory(cell, machine)) for cell in alike.values()]
            yield max(needs, key=lambda one: one[1].total if one[1] else 0)

    def remedy(self, experiment: Experiment, has: float) -> str:
        """The first change with which a cell fits, as in ` (--recompute would fit)`; or empty."""
        if not experiment.method.trains:
            return ""
        for change, changed, machine in _changes(experiment):
            need = self.memory(changed, machine)
            if need and need.total <= TIGHT * has:
                return f" ({change} would fit)"
        return ""


def _changes(experiment: Experiment) -> Iterator[tuple[str, Experiment, Machine]]:
    """Ways to need less memory, the mildest first, each as it is written for `backfire run`."""
    machine, size = Machine(), experiment.train.batch_size
    for rows in dict.fromkeys((max(1, size // 2), max(1, size // 4), 1)):
        machine = machine.model_copy(update={"micro_batch": rows})
        yield f"--micro-batch {rows}", experiment, machine
    machine = machine.model_copy(update={"recompute": True})
    least = f"--micro-batch {machine.micro_batch} --recompute"
    yield least, experiment, machine
    for edits, changed in _lighter(experiment):
        yield edits, changed, Machine()
        yield f"{edits} {least}", changed, machine


def _lighter(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    """Edits of the recipe after which training needs less memory, and the cell with them."""
    if experiment.method.name == "full":
        method = experiment.method.model_copy(update={"dtype": "bfloat16"})
        train = experiment.train.model_copy(update={"optimizer": "adamw-8bit"})
        half = experiment.model_copy(update={"method": method, "train": train})
        yield "method.dtype=bfloat16 train.optimizer=adamw-8bit", half
    for name in ("lora", "qlora"):
        if not experiment.method.quantization("cpu") and name != experiment.method.name:
            changed = experiment.model_copy(update={"method": build("methods", name)})
            yield f"method={name}", changed


def lines(recipe: Recipe) -> list[str]:
    """Memory for each model, method and defense of a recipe, time and disk in total; nothing is
    downloaded.

    Raises:
        UserError: the data cannot be read, or a method does not fit its model.
    """
    from backfire.model.load import device_of

    here, device = Forecast(recipe, types_of("auto")), device_of("auto")
    workers = workers_by_device(len(recipe.cells), Machine())
    has = gpu_bytes("auto") if here.device == "cuda" else ram_bytes()
    cells = count(len(recipe.cells), "cell")
    out = [f"Recipe {recipe.name}, {cells}; all figures are estimates"]
    for experiment, need in here.largest():
        counts = here.size(experiment)
        if counts is None or need is None:
            get = f"hf download {experiment.model.name} config.json"
            get = "`backfire validate` converts it" if experiment.model.is_gguf else get
            out.append(
                f"note  {_title(experiment)}: its config.json is not on this machine, so its size "
                f"is unknown ({get})"
            )
            continue
        mark, verdict = _verdict(need, has, workers)
        if mark != "ok   ":
            verdict += here.remedy(experiment, has)
        if experiment.model.is_local and is_bare(experiment.model.path):
            verdict += "; by its config.json, since its folder has no weights"
        out.append(f"{mark} {_title(experiment)}: {_parts(counts, need)} of {verdict}")
    if here.device == "cpu":
        out += _cards(recipe)
    [(compute, _)] = Counter(cell.train.compute for cell in here.cells).most_common(1)
    rate = SHARE * matmul_speed(device, compute)
    source = f"{SHARE} of the speed of large matrix products here"
    costs = describe_cost(cost(here.recipe, here.store, here.rows, here.sizes), rate, source)
    return [*out, *(f"note  {line}" for line in costs)]


def _cards(recipe: Recipe) -> list[str]:
    """What the cells with a large model need on a GPU, and on which cards they fit."""
    large = [cell for cell in recipe.cells if (num_weights(cell.model) or 0) >= _LARGE]
    if not large:
        return []
    part = replace(recipe, cells=tuple(large), axes=tuple({} for _ in large))
    there = Forecast(part, Types("cuda", "bfloat16", "bfloat16"))
    out = []
    for experiment, need in there.largest():
        if need:
            verdict = _on_cards(there, experiment, need)
            out.append(f"note  on a GPU, {_title(experiment)}: {amount(need.total)}; {verdict}")
    return out


def _on_cards(there: Forecast, experiment: Experiment, need: Memory) -> str:
    """Which cards hold a cell, as in `fits 40 and 80 GB, not 24 GB (--recompute would fit)`."""
    by_verdict: dict[str, list[str]] = {}
    for card in reversed(CARDS):
        fits = need.total <= TIGHT * card
        verdict = "fits {}" if fits else f"not {{}}{there.remedy(experiment, card)}"
        by_verdict.setdefault(verdict, []).insert(0, f"{card / 1e9:.0f}")
    return ", ".join(
        verdict.format(f"{listing(cards)} GB") for verdict, cards in by_verdict.items()
    )


def _title(experiment: Experiment) -> str:
    knobs = [f"{k}={v}" for k, v in experiment.method.spec().items() if k in _NAMED]
    method = " ".join([experiment.method.name, *knobs])
    defense = [experiment.defense_name] if experiment.defense else []
    return ", ".join([experiment.model.title, method, *defense])


def _parts(size: Size, need: Memory) -> str:
    weights = f"{size.parameters / 1e6:,.2f} M weights"
    if not size.trainable:
        return f"{weights}, none trained: {amount(need.total)} with the libraries,"
    whole = (
        f"{weights}, {size.trainable / 1e6:,.2f} M trained: {amount(need.weights)} weights + "
        f"{amount(need.state)} gradients and optimizer + {amount(need.passes)} activations of "
        f"{need.num_rows} rows + libraries = {amount(need.libraries + need.mapped + need.training)}"
    )
    if need.asked == need.total:
        return f"{whole}, while the base is asked about the rows {amount(need.total)}"
    if need.evaluation > need.training:
        whole += f", in evaluation {amount(need.total)}"
    return whole


def _verdict(need: Memory, has: float, workers: int) -> tuple[str, str]:
    """A mark, and whether it fits."""
    if workers * need.total <= TIGHT * has:
        return "ok   ", f"{amount(has)}: fits"
    if (most := int(TIGHT * has / need.total)) >= 1:
        return "note ", f"{amount(has)}: fits, but not {workers} at once; at most {most}"
    if need.total <= has:
        return "note ", f"{amount(has)}: is tight"
    return "lacks", f"{amount(has)}: does not fit"


def matmul_speed(device: torch.device, compute: str) -> float:
    """Measure the FLOP/s of large matrix products in the type `compute`, as in training, for a
    fraction of a second with all threads."""
    import torch

    from backfire.model.products import linear

    on_gpu = device.type == "cuda"
    width, at_once = (8192, 10) if on_gpu else (1024, 1)
    a = torch.randn(width, width, device=device, dtype=getattr(torch, compute))
    count, begin = -1, 0.0  # the first round is a warm-up
    while count < 0 or time.perf_counter() - begin < 0.2:
        for _ in range(at_once):
            linear(a, a)
        if on_gpu:
            torch.cuda.synchronize(device)
        begin, count = (time.perf_counter(), 0) if count < 0 else (begin, count + at_once)
    return count * 2 * width**3 / (time.perf_counter() - begin)
