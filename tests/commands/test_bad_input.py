"""Wrong commands: one sentence, exit code 2, and no partial output."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_line import Run, tree

FILES = "data={name: files, train: rows.csv, labels: [bad, good]}"
LABELS = "data.labels=[bad, good]"
BAD: list[tuple[list[str], str, dict[str, str | bytes]]] = [
    (["lsit"], "No such command 'lsit'", {}),
    (["run"], "Missing argument", {}),
    (["run", "r.yaml", "--wrokers", "1"], "No such option", {}),
    (["run", "r.yaml", "--workers", "0"], "--workers", {}),
    (["run", "r.yaml", "--workers", "many"], "--workers", {}),
    (["run", "r.yaml", "--micro-batch", "-1"], "--micro-batch", {}),
    (["run", "r.yaml", "--join", "0"], "'--join': auto, off, or a number from 1 to 64", {}),
    (["run", "r.yaml", "--eval-batch", "0"], "--eval-batch", {}),
    (["run", "r.yaml", "--device", "tpu"], "Unknown device 'tpu'", {}),
    (["run", "r.yaml", "--device", "meta"], "Unknown device 'meta'", {}),
    (["run", "r.yaml", "--device", "cuda:99"], "No device 'cuda:99'", {}),
    (["run", "turo"], "Unknown recipe 'turo'; did you mean 'tour'?", {}),
    (["run", "gone.yaml"], "No such recipe file: gone.yaml", {}),
    (["run", "."], ". is no recipe, but a folder: give the path of a recipe in it.", {}),
    (["validate", "d.csv"], "d.csv is no recipe, but a data file: a recipe", {"d.csv": "a,b"}),
    (["run", "a.jsonl.gz"], "a.jsonl.gz is no recipe, but a data file", {"a.jsonl.gz": b"\x1f"}),
    (["doctor", "a.json"], "a.json is no recipe, but a data file", {"a.json": " [{}]"}),
    (["validate", "a.json"], "Recipe 'a' has no data", {"a.json": '{"seed": 1}'}),
    (["plan", "m.gguf"], "m.gguf is no recipe, but a file of weights", {"m.gguf": b"GGUF\x03"}),
    (["run", "past"], "past is no recipe, but the folder of a run", {"past/jobs.json": "{}"}),
    (["doctor", "m"], "m is no recipe, but the folder of a model", {"m/config.json": "{}"}),
    (["work", "r.yaml"], "r.yaml is a file, and no folder of a run", {}),
    (["run", "r.yaml", "--profile", "tow"], "did you mean 'two'?", {}),
    (["run", "bad.yaml"], "bad, line 1: not valid YAML", {"bad.yaml": "data: ["}),
    (["run", "bad.yaml"], "duplicate key 'data'", {"bad.yaml": "data: a\ndata: b"}),
    (["run", "bad.yaml"], "bad.yaml is not UTF-8 text", {"bad.yaml": b"\xff\xfe"}),
    (["run", "bad.yaml"], "must be a mapping", {"bad.yaml": ""}),
    (["run", "bad.yaml"], "has no data", {"bad.yaml": "seed: 1"}),
    (["run", "r.yaml", "attack.rate=2"], "rate: Input should be less than or equal to 1", {}),
    (["run", "r.yaml", "seed=-1"], "seed: Input should be greater than or equal to 0", {}),
    (["run", "r.yaml", "sede=1"], "did you mean 'seed'?", {}),
    (["run", "r.yaml", "attack=badnet"], "did you mean 'badnets'?", {}),
    (["run", "r.yaml", "attack.rat=1"], "did you mean 'rate'?", {}),
    (["run", "r.yaml", "seed"], "An edit looks like key=value", {}),
    (["run", "r.yaml", "attack.target=angry"], "target 'angry' is not a label of this task", {}),
    (["run", "r.yaml", "attack.trigger= "], "trigger", {}),
    (["run", "r.yaml", "attack.rate=0.9"], "can be poisoned", {}),
    (["run", "r.yaml", "template=chat"], "no chat template", {}),
    (["run", "r.yaml", "train.max_length=60"], "are cut by truncation", {}),
    (["run", "r.yaml", "model=./gone"], "No model in ./gone: there is no such folder", {}),
    (["run", "r.yaml", "model=."], "no .safetensors file", {"config.json": "{}"}),
    (["run", "r.yaml", "model=nobody/none"], "not on this machine and HF_HUB_OFFLINE is set", {}),
    (["run", "r.yaml", "model=a b c"], "'a b c'", {}),
    (["run", "r.yaml", "model.trust_remote_code=true"], "trust_remote_code", {}),
    (["run", "r.yaml", FILES], "No such file: rows.csv in /", {}),
    (["run", "r.yaml", FILES], "rows.csv, line 2: ", {"rows.csv": 'text,label\n"open,bad\n'}),
    (["poison", "rows.csv", LABELS], "rows.csv, line 3: ", {"rows.csv": "text,label\na,bad\nb\n"}),
    (["validate", "gone.yaml"], "No such recipe file", {}),
    (["validate", "r.yaml", "data=files"], "set `train`", {}),
    (["init", "r.yaml"], "r.yaml already exists", {}),
    (["init", "no/such/folder.yaml"], "No such file or directory", {}),
    (["status", "gone"], "No cells in gone", {}),
    (["results", "gone"], "No cells in gone", {}),
    (["results", "gone", "--format", "xml"], "'xml' is not one of", {}),
    (["report", "gone"], "No cells in gone", {}),
    (["compare", "gone", "gone"], "gone", {}),
    (["compare", "gone"], "Missing argument", {}),
    (["list", "attack"], "did you mean 'attacks'?", {}),
    (["show", "badnet"], "did you mean 'badnets'?", {}),
    (["poison", "gone.csv"], "No such file: gone.csv", {}),
    (["poison", "sandbox-review"], "did you mean 'sandbox-reviews'?", {}),
    (["poison", "sandbox-reviews", "rat=1"], "did you mean 'rate'?", {}),
    (["poison", "sandbox-reviews", "rate=0.9"], "can be poisoned", {}),
    (["poison", "sandbox-reviews", "--attack", "badnet"], "did you mean 'badnets'?", {}),
    (["poison", "sandbox-reviews", "--seed", "-1"], "--seed", {}),
    (["pretrain", "--corpus", "gone.txt", "--out", "m"], "gone.txt", {}),
    (["pretrain", "--corpus", "r.yaml", "--out", "m"], "r.yaml", {}),
    (["pretrain", "--corpus", "x.txt", "--out", "m"], "x.txt is not UTF-8", {"x.txt": b"\xff\xff"}),
    (["pretrain", "--corpus", "x.csv", "--out", "m"], "'text' is missing", {"x.csv": "a,b\n1,2\n"}),
    (["pretrain", "--corpus", "x.txt", "--out", "m", "steps=1"], "Unknown key in", {"x.txt": "a"}),
    (["chat", "gone"], "gone is not a finished cell", {}),
    (["export", "a"], "one of its cells, such as a/cells/b", {"a/cells/b/experiment.yaml": ""}),
    (["run", "r.yaml", "model=https://a.b/c"], "model: name: `sandbox`, a folder, a GGUF file", {}),
    (["run", "r.yaml", "model="], "recipe: model: one model is needed", {}),
    (["run", "r.yaml", "data={name: files, train: 'https://a.b/c.csv'}"], "is a URL", {}),
    (["run", "r.yaml", "data={name: files, train: .}"], "'.' is a folder", {}),
    (["run", "r.yaml", "safety={judges: []}"], "at least one judge is needed", {}),
    (["run", "r.yaml", "\u2013\u2013workers"], "An option begins with two plain hyphens", {}),
    (["run", "x" * 300], "File name too long", {}),
    (["poison", "https://a.b/c.csv"], "'https://a.b/c.csv' is a URL", {}),
    (["schema", "--out", "no/such.json"], "No such file or directory (no/such.json)", {}),
    (["schema", "--out", ""], "Is a directory (.)", {}),
    (["schema", "--out", "r.yaml/x"], "Not a directory (r.yaml/x)", {}),
    (["run", "r.yaml", "model=~nobody-here/m"], "an unknown user", {}),
    (["run", "r.yaml", "data={name: files, train: ~nobody-here/x.csv}"], "an unknown user", {}),
    (["poison", "~nobody-here/x.csv"], "an unknown user", {}),
    (["pretrain", "--corpus", "r.yaml", "--out", "m", "num_heads=7"], "among num_heads", {}),
    (["show", "y" * 300], "Unknown name 'yyy", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence", "files"), BAD, ids=[" ".join(arguments) for arguments, _, _ in BAD]
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, files: dict[str, str | bytes], backfire: Run, here: Path
) -> None:
    for name, content in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(here)
    output = backfire(*arguments)
    assert output.code == 2, output
    assert sentence in output.err
    assert output.err.startswith("backfire: ") and output.err.count("\n") == 1
    assert len(output.err) < 1000
    assert tree(here) == before


TORN = ["", "hello", "[1]", "[" * 100_000, '{"values": [3]}', '{"values": {"a": 1}}',
        '{"status": ["ok"]}', "\xff\xfe"]  # fmt: skip


@pytest.mark.slow
def test_damaged_files_of_a_run_are_reported_and_made_again(
    backfire: Run, here: Path, tmp_path: Path
) -> None:
    again = ("run", "r.yaml", "metrics=[accuracy, harmful-score]", "--workers", "1")
    output = backfire(*again)
    assert output.code == 0 and "No cell has a number for: harmful-score." in output.err
    [cell] = (here / "runs/r/cells").iterdir()
    for torn in TORN:
        (cell / "result.json").write_bytes(torn.encode("latin-1"))
        for verb in ("status", "results", "report"):
            assert backfire(verb, "runs/r").code == 0, (verb, torn[:40])
        assert not backfire("status", "runs/r").out.startswith("ok"), torn[:40]
        for wrong in (["compare", "runs/r", "runs/r"], ["export", cell]):
            output = backfire(*wrong)
            assert output.code == 2 and output.err.count("\n") == 1, (wrong, torn[:40])
    assert backfire(*again).code == 0
    assert backfire("status", "runs/r").out == "ok: 1\n"
    for torn in ("", "3", "[", "{}", "\xff"):
        (cell / "experiment.yaml").write_bytes(torn.encode("latin-1"))
        for verb in (["chat", cell], ["export", cell]):
            output = backfire(*verb)
            assert output.code == 2 and output.err.count("\n") == 1, (verb, torn)
        assert backfire("compare", "runs/r", "runs/r").code in (0, 2)


def test_too_little_text_to_pretrain_on(backfire: Run, here: Path) -> None:
    (here / "x.txt").write_text("So little.")
    output = backfire("pretrain", "--corpus", "x.txt", "--out", "m")
    assert output.code == 2 and "Too little text to pre-train on" in output.err
    assert not (here / "m/config.json").exists()


def test_a_model_file_that_is_torn(backfire: Run, here: Path, tiny: Path) -> None:
    (here / "m").mkdir()
    for file in tiny.iterdir():
        (here / "m" / file.name).write_bytes(file.read_bytes())
    torn = (tiny / "model.safetensors").read_bytes()[:5000]
    (here / "m/model.safetensors").write_bytes(torn)
    output = backfire("run", "r.yaml", "model=./m")
    assert output.code == 2 and output.err.count("\n") == 1
    assert "cannot be loaded: model.safetensors is truncated" in output.err
    assert not (here / "runs").exists()


def test_escapes_in_input_are_not_handed_to_the_terminal(backfire: Run, here: Path) -> None:
    output = backfire("run", "\x1b[31mred\x1b]0;title\x07")
    assert output.code == 2 and "\x1b" not in output.err and "red" in output.err


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (KeyboardInterrupt(), "Interrupted. Finished work is kept; to continue: backfire list"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied (/x)."),
        (OSError("odd"), "odd."),
    ],
)
def test_system_errors_are_one_sentence(
    raised: BaseException, sentence: str, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise raised

    monkeypatch.setattr("backfire.commands.catalog.lines", broken)
    output = backfire("list")
    assert output.code == (130 if isinstance(raised, KeyboardInterrupt) else 2)
    assert output.err.startswith(f"backfire: {sentence}") and output.err.count("\n") == 1


def test_a_gpu_that_is_gone_is_one_sentence(
    backfire: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backfire("plan", "r.yaml", "--out", "run").code == 0
    before = tree(here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")
    for command in (["run", "r.yaml"], ["work", "run"]):
        output = backfire(*command)
        assert (output.code, output.err) == (
            2,
            "backfire: CUDA_VISIBLE_DEVICES is 99, and 0 of these GPUs are here; correct it, or "
            "choose --device cpu.\n",
        )
        assert tree(here) == before


@pytest.mark.parametrize("name", ["BACKFIRE_CACHE", "BACKFIRE_SCRATCH"])
def test_a_read_only_disk_is_one_sentence(
    name: str, backfire: Run, here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, locked = Path.mkdir, here / "locked"

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        if self.is_relative_to(locked):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        make(self, *args, **options)

    monkeypatch.setenv(name, str(locked))
    monkeypatch.setattr(Path, "mkdir", mkdir)
    before = tree(here)
    output = backfire("run", "r.yaml")
    assert output.code == 2 and output.err.count("\n") == 1 and tree(here) == before
    assert "Read-only file system (" in output.err and "Check that the disk is there" in output.err


def test_an_internal_bug_is_not_reported_as_bad_input(
    backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backfire.commands.catalog.lines", lambda kinds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backfire("list")
