"""Every model is freed after its job."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from backfire.data.render import Renderer
from backfire.experiment import Experiment, Machine
from backfire.launch.job import RunFolder, run_job
from backfire.model import load as loading
from backfire.plan import Job
from backfire.registry import find
from backfire.store import Store
from backfire.train import loop
from backfire.train.finetune import Start, tune
from tests.helpers.real_size import DEFENSES, rows_of

pytestmark = pytest.mark.slow


def tuned(tiny: Path, renderer: Renderer, folder: Path, **knobs: Any) -> dict[str, Any]:
    settings = {"model": str(tiny), "data": "sandbox-reviews", "train": {"max_steps": 1}, **knobs}
    cell, rows = Experiment.make(settings), rows_of(8)
    folder.mkdir(exist_ok=True)
    start = Start(tiny, aligned=rows, harmful=rows)
    return tune(cell, rows, None, renderer, start, folder, Machine(), lambda *_: None)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trained_model_does_not_outlive_its_job(
    method: str,
    fails: bool,
    tiny: Path,
    renderer: Renderer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even until somebody collects what is held in circles."""
    import gc

    from backfire.judges import _model

    seen: list[weakref.ref[Any]] = []
    load = loading.load_base

    def spied(*args: Any) -> Any:
        model = load(*args)
        seen.extend([weakref.ref(model), weakref.ref(next(model.parameters()))])
        return model

    monkeypatch.setattr(loading, "load_base", spied)
    if fails:
        monkeypatch.setattr(loop, "answer_logits", lambda *_: 1 / 0)
    _model.load.cache_clear()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) if fails else monkeypatch.context():
            summary = tuned(
                *(tiny, renderer, tmp_path / "out"),
                method=method,
                defense=["kl", DEFENSES["ldifs"]],
            )
        assert len(seen) == 2 and [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
    if not fails:
        assert summary["learning_rate"] == find("methods", method).rates[0]  # type: ignore[attr-defined]


def test_a_judge_is_freed_before_the_next_training(
    tiny: Path, renderer: Renderer, tmp_path: Path
) -> None:
    from backfire.judges import _model

    model, _ = _model.load("CausalLM", str(tiny), None, "cpu")
    ref = weakref.ref(model)
    del model
    assert ref() is not None, "it is kept from one batch of replies to the next"
    tuned(tiny, renderer, tmp_path / "out")
    assert ref() is None
    ref = weakref.ref(_model.load("CausalLM", str(tiny), None, "cpu")[0])
    job = Job(
        "base-x", "base", Experiment.make({"data": "sandbox-reviews", "model": str(tiny)}), {}
    )
    store = Store(tmp_path / "cache")
    assert run_job(job, RunFolder(tmp_path, "r"), store, Machine(), lambda *_: None) == "ok"
    assert ref() is None, "nor does it stay for the next job"
