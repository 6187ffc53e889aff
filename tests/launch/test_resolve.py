"""Commits and types left open by a recipe are resolved once and are part of the keys."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from backfire import stages
from backfire.errors import UserError
from backfire.experiment import Model
from backfire.launch.resolve import resolve_auto, types_of
from backfire.model.types import Types, types_here
from backfire.recipe import parse
from backfire.stages import MEASURES, base_key
from backfire.train.finetune import Start, start_type
from backfire.train.precision import compute_type
from tests.helpers.small_run import Place

GPU = Types("cuda", "bfloat16", "bfloat16")
OLD_GPU = Types("cuda", "float32", "float32")
LAPTOP = Types("cpu", "float32", "float32")
RECIPE = "data: sandbox-reviews\nmatrix: {method: [full, lora, qlora]}\n"
CPU = torch.device("cpu")


def keys(text: str, types: Types) -> list[str]:
    return [stages.cell_key(cell) for cell in resolve_auto(parse("r", text), types).cells]


# ------------------------------------------------------------------------------------ precision


def test_another_precision_is_another_key() -> None:
    found = [keys(RECIPE, types) for types in (GPU, OLD_GPU, LAPTOP)]
    assert all(len({*column}) > 1 for column in zip(*found, strict=True))
    explicit = "model: {name: sandbox, dtype: float32}\ntrain: {compute: float32}\n"
    assert keys(explicit + RECIPE, GPU)[:2] == keys(RECIPE, LAPTOP)[:2], (
        "explicit and resolved types have the same keys"
    )
    aligned = RECIPE + "align: {}\n"
    assert not {*keys(aligned, GPU)} & {*keys(aligned, LAPTOP)}


def test_resolved_types_are_kept() -> None:
    once = resolve_auto(parse("r", RECIPE + "align: {method: qlora, merge: true}\n"), GPU)
    assert resolve_auto(once, LAPTOP) == once
    for cell in once.cells:
        assert cell.model.dtype == cell.train.compute == "bfloat16"
        assert cell.align and cell.align.train.compute == "bfloat16"
        assert cell.align.method.quantization("cpu")["bnb_4bit_compute_dtype"] == "bfloat16"


def test_on_a_cpu_torch_says_the_same() -> None:
    here = types_of("auto")
    assert here == types_of("cpu") == types_here()
    assert here.compute == compute_type("auto", CPU)
    before = parse("r", RECIPE + "align: {}\n")
    after = resolve_auto(before, here)
    assert before.cells != after.cells
    assert [stages.keys(cell) for cell in before.cells] == [
        stages.keys(cell) for cell in after.cells
    ]


@pytest.mark.parametrize(
    ("listed", "count", "sentence"),
    [
        ("7", 0, "CUDA_VISIBLE_DEVICES is 7, and 0 of these GPUs are here; correct it, or"),
        ("0,7", 1, "CUDA_VISIBLE_DEVICES is 0,7, and 1 of these GPUs is here; correct it, or"),
        ("GPU-1b2c", 0, "CUDA_VISIBLE_DEVICES is GPU-1b2c, and 0 of these GPUs are here"),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_is_named_and_lost_is_refused(
    device: str, listed: str, count: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"^{sentence}"):
        types_of(device)
    assert types_of("cpu").device == "cpu"


@pytest.mark.parametrize("listed", ["", "-1", "none"])
def test_gpus_that_are_hidden_are_none(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert types_of("auto") == types_of("cpu")


@pytest.mark.parametrize(
    ("capability", "wide", "expected"),
    [((8, 0), True, "bfloat16"), ((7, 5), False, "float16"), ((6, 1), False, "float32")],
    ids=["A100", "T4", "P40"],
)
def test_a_gpu_computes_in_the_best_type_that_it_has(
    capability: tuple[int, int], wide: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: wide)
    types = types_of("cuda:0")
    assert types == Types("cuda", expected, expected)  # type: ignore[arg-type]
    for cell in resolve_auto(parse("r", RECIPE), types).cells:
        assert cell.model.dtype == cell.train.compute == expected
        assert getattr(cell.method, "compute", expected) == expected


@pytest.mark.parametrize("need", ["scores", "replies", "answers"])
def test_what_was_measured_another_way_is_no_finished_cell(
    need: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"data: sandbox-reviews\nmethod: none\nmodel: {tiny}\nmetrics: accuracy\n"
    [cell] = parse("r", text).cells
    before, stage = stages.cell_key(cell), stages.evaluation(cell, stages.clean_rows(cell), [need])
    monkeypatch.setitem(MEASURES, need, 99)
    assert (
        stages.cell_key(cell) != before
        and stages.evaluation(cell, stages.clean_rows(cell), [need]) != stage
    )


@pytest.mark.slow
def test_results_name_their_types(tiny: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny)
    assert place.run(attack="none", train={"max_steps": 1}, metrics=["accuracy"]) == 0
    [result] = place.results().values()
    [file] = place.out.glob("cells/*/experiment.yaml")
    cell = yaml.safe_load(file.read_text())
    assert (cell["model"]["dtype"], result["evaluate"]["dtype"]) == ("float32", "float32")
    assert cell["train"]["compute"] == types_of("cpu").compute == result["train"]["compute"]


def made(place: Place, stage: str) -> dict[str, torch.Tensor]:
    [file] = place.cache.glob(f"{stage}/*/*model.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "repair"])
def test_trained_weights_start_from_float32_and_are_repaired_in_it(
    stage: str, tiny: Path, tmp_path: Path
) -> None:
    """In bfloat16 the stored base, and so every weight here, would be rounded to 8 bits."""
    found = []
    for dtype in ("float32", "bfloat16"):
        place = Place(tmp_path / dtype, tiny)
        knobs: dict[str, Any] = {
            "model": {"name": str(tiny), "dtype": dtype},
            "train": {"max_steps": 2, "batch_size": 4, "compute": "float32"},
            "metrics": ["accuracy"],
            "attack": "none",
        }
        if stage == "repair":
            part = {"name": "sandbox-reviews", "rows": 20, "test_rows": 8, "seed": 1}
            knobs["align"] = {"data": part, "train": knobs["train"]}
            knobs |= {"defense": "task-arithmetic", "method": "full"}
        assert place.run(**knobs) == 0
        [result] = place.results().values()
        assert result["evaluate"]["dtype"] == dtype and result["train"]["dtype"] == "float32"
        found.append(made(place, stage))
    assert {weight.dtype for weight in found[1].values()} == {torch.float32}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_adapter_lies_on_an_aligned_model_as_it_was_aligned(tmp_path: Path) -> None:
    [plain, adapted] = parse(
        "r", "model: {name: sandbox, dtype: bfloat16}\ndata: sandbox-reviews\n"
        "matrix: {method: [full, lora]}\n",
    ).cells  # fmt: skip
    alone, aligned = Start(tmp_path), Start(tmp_path / "aligned", None, tmp_path)
    below = Start(tmp_path, tmp_path / "adapter", tmp_path)
    assert start_type(plain, alone, CPU) == torch.float32
    assert start_type(adapted, aligned, CPU) == torch.float32
    assert start_type(adapted, alone, CPU) == start_type(adapted, below, CPU) == torch.bfloat16


# ------------------------------------------------------------------------------------------ hub


class Hub:
    """A hub on this machine with one model; counts what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.ends = folder, list[str](), list[int]()
        hub = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/next":
                    hub.ends.append(len(hub.asked))
                else:
                    hub.asked.append(self.path)
                _, _, path = self.path.partition("/me/small")
                body, head = hub.answer(path)
                self.send_response(200 if body is not None else 404)
                for name, value in head.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    @property
    def commit(self) -> str:
        """The branch moves on with each `/next`."""
        return str(1 + len(self.ends)) * 40

    def answer(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        if path.startswith("/revision/"):
            names = [{"rfilename": file.name} for file in self.files()]
            return json.dumps(
                {"id": "me/small", "sha": self.commit, "siblings": names}
            ).encode(), {}
        if path.startswith("/tree/"):
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                for f in self.files()
            ]
            return json.dumps(tree).encode(), {}
        if not path:
            return b"", {}
        file = self.folder / path.rpartition("/")[2]
        if not path.startswith("/resolve/") or not file.is_file():
            return None, {}
        body = file.read_bytes()
        tag = hashlib.sha1(body).hexdigest()
        return body, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit}


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = {"odd": torch.zeros(3)}
    for name in ("consolidated", "adapter_model", "model.fp16"):
        save_file(weights, folder / f"{name}.safetensors")
    found = Hub(folder)
    yield found
    found.server.shutdown()
    found.server.server_close()


WHOLE = """
import sys
from urllib.request import urlopen
from backfire.cli import main
from backfire.experiment import Model
from backfire.stages import MEASURES
from backfire.model.source import pin

def say(*arguments):
    sys.argv = ["backfire", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)

say("run", "r.yaml", "--out", "out", "--workers", "1")
urlopen("{url}/next").read()
say("run", "r.yaml", "--dry-run")
urlopen("{url}/next").read()
print("moved to", pin(Model(name="me/small")).revision)
"""


@pytest.mark.slow
def test_the_hub_is_asked_once_a_run_and_the_commit_is_in_the_key(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: me/small\ntemplate: sentiment-line\nmethod: none\nmetrics: [accuracy]\n"
        "data: {name: sandbox-reviews, rows: 30, test_rows: 12}\n"
    )
    # The address of the hub is read when its library is first imported.
    env = {name: v for name, v in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    own |= {"BACKFIRE_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", WHOLE.format(url=hub.url)]
    done = subprocess.run(command, env=env | own, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, dry, moved = (
        hub.asked[i:j] for i, j in zip([0, *hub.ends], [*hub.ends, None], strict=True)
    )
    assert sum("/revision/" in path for path in run) == 1, run
    fetched = {path.rpartition("/")[2] for path in run if "/resolve/" in path}
    assert {name for name in fetched if name.endswith(".safetensors")} == {"model.safetensors"}
    [cell] = (tmp_path / "out/cells").iterdir()
    assert yaml.safe_load((cell / "experiment.yaml").read_text())["model"]["revision"] == "1" * 40
    assert not dry, "a dry run makes no request"
    assert moved and f"moved to {'3' * 40}" in done.stdout


def test_the_key_covers_the_commit() -> None:
    models = [Model(name="me/small", revision=commit * 40) for commit in "ab"]
    assert base_key(models[0]) != base_key(models[1])
    assert base_key(Model(name="me/small", dtype="bfloat16")) != base_key(Model(name="me/small"))
