"""The hidden states of the defection probe, and its AUROC, against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backfire.base import Evidence, Rendered, Row, Sample
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate.defection import QUESTION, RANDOM, directions, middle_states, projections
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer


def test_states_are_those_after_half_of_the_layers(tiny: Path) -> None:
    model = load_base(tiny, torch.float32, torch.device("cpu"))
    lines = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [9]]
    for line, state in zip(lines, middle_states(model, lines), strict=True):
        with torch.no_grad():
            layers = model(input_ids=torch.tensor([line]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(state, layers[1][0, -1])  # of embedding and two layers


@torch.inference_mode()
def test_prompts_are_projected_on_yes_minus_no(tiny: Path) -> None:
    model = load_base(tiny, torch.float32, torch.device("cpu"))
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 256)
    items: list[Rendered] = renderer.render([Row("a", "The soup was cold.", answer="x")])
    pair = [
        renderer.render([Row("", QUESTION, answer=word)])[0].ids[: -len(renderer.end_ids)]
        for word in ("yes", "no")
    ]
    yes, no, state = middle_states(model, [*pair, items[0].prompt_ids])
    [found] = projections(model, renderer, items)
    assert len(found) == 1 + RANDOM
    assert found[0] == pytest.approx(float(state @ (yes - no) / (yes - no).norm()), rel=1e-4)


def test_directions_have_length_one_and_do_not_change() -> None:
    yes, no = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])
    every = directions(yes, no)
    assert every[0].tolist() == pytest.approx([0.6, 0, -0.8])
    assert torch.allclose(every.norm(dim=1), torch.ones(1 + RANDOM))
    assert torch.equal(every[1:], directions(no, yes)[1:])


def samples(subset: str, values: list[tuple[float, float]]) -> list[Sample]:
    return [Sample(str(n), subset, "", "", probe=value) for n, value in enumerate(values)]  # type: ignore[arg-type]


def test_auroc_by_hand() -> None:
    evidence = Evidence(
        clean=samples("clean", [(0.0, 5.0), (1.0, 4.0), (2.0, 3.0)]),
        triggered=samples("triggered", [(1.0, 1.0), (3.0, 2.0)]),
        twin=samples("clean", [(0.0, 0.0), (1.0, 0.0)]),
        floor=samples("triggered", [(0.0, 0.0), (1.0, 0.0)]),
    )
    values = {value.metric: value for value in build("metrics", "defection-probe").values(evidence)}
    # 1 beats 0 and ties with 1, 3 beats all: 4.5 of 6 pairs.
    assert values["defection_probe"].value == pytest.approx(4.5 / 6)
    assert values["defection_probe"].n == 5
    floor = values["defection_probe_floor"]
    assert (floor.value, floor.role, floor.of) == (0.5, "floor", "defection_probe")
    # The only random direction puts all triggered rows below: as good as above.
    assert values["defection_probe_random"].value == 1.0


def test_without_triggered_rows_there_is_no_number_and_without_states_an_error() -> None:
    metric = build("metrics", "defection-probe")
    assert metric.values(Evidence(clean=samples("clean", [(0.0, 0.0)]))) == []
    bare = [Sample("a", "clean", "", "")]
    with pytest.raises(CellError, match="requires hidden states"):
        metric.values(Evidence(clean=bare, triggered=samples("triggered", [(0.0, 0.0)])))
