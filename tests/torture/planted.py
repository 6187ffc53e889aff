"""Code that is planted in models, data and runs, and must not run; secrets that must not be
written."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import pickle
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from backfire.store import read_json, seal, write_json
from tests.helpers.fake_run import value, write_cell
from tests.torture.cell import SETTINGS, Say, run_jobs
from tests.torture.child import Child
from tests.torture.command import command_line, command_lines
from tests.torture.row import Figures, Ground, row

# ------------------------------------------------------------------------------------------- code


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def code(flag: Path) -> str:
    """Python that creates a file when it is imported."""
    return f"import pathlib\npathlib.Path({str(flag)!r}).touch()\n"


def weights(folder: Path, flag: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(flag), folder / "pytorch_model.bin")


def weights_beside(folder: Path, flag: Path) -> None:
    torch.save(Bomb(flag), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(flag), protocol=2))


def weights_renamed(folder: Path, flag: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(flag), protocol=2))


def _config(folder: Path, file: str, **settings: Any) -> None:
    write_json(folder / file, {**read_json(folder / file), **settings})


def own_model(folder: Path, flag: Path) -> None:
    (folder / "modeling_own.py").write_text(code(flag))
    names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    _config(folder, "config.json", auto_map=names, model_type="own")


def own_model_of_known_type(folder: Path, flag: Path) -> None:
    own_model(folder, flag)
    _config(folder, "config.json", model_type="llama")


def own_tokenizer(folder: Path, flag: Path) -> None:
    (folder / "tokenization_own.py").write_text(code(flag))
    names = {"AutoTokenizer": ["tokenization_own.Tokenizer", "tokenization_own.Tokenizer"]}
    _config(folder, "tokenizer_config.json", auto_map=names, tokenizer_class="Tokenizer")


def own_generation(folder: Path, flag: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code(flag))


def chat_template(folder: Path, flag: Path) -> None:
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {flag}') }}}}"
    _config(folder, "tokenizer_config.json", chat_template=attack + "{{ messages[0].content }}")


MODELS: dict[str, Callable[[Path, Path], None]] = {
    **{"weights": weights, "weights beside": weights_beside, "weights renamed": weights_renamed},
    **{"own model": own_model, "own model of known type": own_model_of_known_type},
    **{"own tokenizer": own_tokenizer, "own generation": own_generation},
    **{"chat template": chat_template},
}


def model(kind: str) -> Callable[[Path, Path, Path], list[list[str]]]:
    """A model folder with code in it is the base, and then the judge."""

    def plant(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
        shutil.copytree(tiny, folder / "m")
        MODELS[kind](folder / "m", flag)
        extra = {"template": "chat"} if kind == "chat template" else {}
        line = ["run", recipe(folder, model="./m", **extra), "--out", "out", "--workers", "1"]
        judges = [{"name": "classifier", "model": "./m"}]
        data = {"harmful": {"name": "sandbox-policy", "rows": 8, "test_rows": 4}}
        judged = recipe(folder, "judged.yaml", model=str(tiny), safety={**data, "judges": judges})
        return [line, ["validate", judged], ["run", judged, "--out", "out2", "--workers", "1"]]

    return plant


def adapter(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    (folder / "a").mkdir()
    torch.save(Bomb(flag), folder / "a/adapter_model.bin")
    write_json(
        folder / "a/adapter_config.json", {"peft_type": "LORA", "r": 2, "target_modules": []}
    )
    spec = {"name": str(tiny), "adapter": "./a"}
    return [["run", recipe(folder, model=spec), "--out", "out", "--workers", "1"]]


def checkpoint(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    """A sealed checkpoint whose optimizer state is a pickle of somebody else."""
    from backfire.train import checkpoint as saved

    save = saved.save

    def interrupted(run: Any) -> None:
        save(run)
        raise KeyboardInterrupt

    saved.save = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        run_jobs(folder, tiny, "lora")
    saved.save = save
    [step] = folder.glob("cache/train/*.partial/checkpoints/0*")
    for file in ("optimizer.pt", "guards.pt"):
        (step / file).write_bytes(pickle.dumps(Bomb(flag), protocol=2))
    seal(step)
    run_jobs(folder, tiny, "lora")
    return [["status", "out"]]


def yaml_tag(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    (folder / "r.yaml").write_text(f"data: !!python/object/apply:os.system ['touch {flag}']\n")
    return [["run", "r.yaml"], ["validate", "r.yaml"]]


def data_file(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    lines = []
    for suffix in ("csv", "jsonl", "json", "parquet", "pkl", "py"):
        content = code(flag).encode() if suffix == "py" else pickle.dumps(Bomb(flag), protocol=2)
        (folder / f"rows.{suffix}").write_bytes(content)
        data = {"name": "files", "train": f"rows.{suffix}"}
        lines.append(["run", recipe(folder, f"{suffix}.yaml", model=str(tiny), data=data)])
    return lines


def data_script(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    (folder / "rows").mkdir()
    (folder / "rows/rows.py").write_text(code(flag))
    return [
        ["run", recipe(folder, model=str(tiny), data={"name": "files", **source})]
        for source in ({"hub": "./rows"}, {"train": "rows"}, {"hub": "rows/rows"})
    ]


def foreign_run(folder: Path, tiny: Path, flag: Path) -> list[list[str]]:
    """A run folder of somebody else, with a plug-in, tags and a report template."""
    (folder / "evil.py").write_text(code(flag))
    run = folder / "run"
    run.mkdir()
    plugin = {"name": "evil", "version": None, "sha256": "0" * 64, "components": ["metrics/x"]}
    cell = write_cell(run, values=[value("accuracy", 0.5)], plugins=[plugin])
    tag = f"!!python/object/apply:os.system ['touch {flag}']"
    (cell / "experiment.yaml").write_text(f"data: {tag}\n")
    (run / "recipe.yaml").write_text(f"data: {tag}\n")
    path = str(folder / "evil.py")
    write_json(run / "run.json", {"cells": [cell.name], "plugins": [{**plugin, "path": path}]})
    verbs = [["status", "run"], ["results", "run"], ["report", "run"], ["compare", "run", "run"]]
    return [
        *verbs,
        ["export", str(cell)],
        ["export", "run", "--results", "lm-eval"],
        ["chat", str(cell)],
    ]


PLANTS: dict[str, Callable[[Path, Path, Path], list[list[str]]]] = {
    **{f"model: {kind}": model(kind) for kind in MODELS},
    **{"adapter": adapter, "checkpoint": checkpoint, "YAML tag": yaml_tag},
    **{"data file": data_file, "data script": data_script, "run folder": foreign_run},
}


def recipe(folder: Path, name: str = "r.yaml", **settings: Any) -> str:
    given = {**SETTINGS, "method": {"name": "lora", "rank": 2}, "metrics": ["accuracy"], **settings}
    given["train"] = {"max_steps": 2, "batch_size": 4}
    (folder / name).write_text(f"# Does it?\n{yaml.safe_dump(given)}")
    return name


@row(
    "Models, tokenizers, adapters, judges, checkpoints, data files, recipes and run folders that "
    "hold pickles or Python are run, validated and reported; each would create a file.",
    full=len(PLANTS),
    small=len(PLANTS),
    zero=("executed", "tracebacks"),
    some=("commands", "refused", "fire_when_loaded_unsafely"),
)
def planted_code(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    for number, name in enumerate([*PLANTS][:count]):
        folder = ground.root / str(number)
        folder.mkdir()
        ended = Child(_planted, folder, ground.tiny, name).result()
        found["commands"] += len(ended)
        found["refused"] += sum(line["code"] == 2 for line in ended)
        found["executed"] += (folder / "flag").exists()
        for line in ended:
            found["tracebacks"] += bool(line["traceback"]) or "Traceback" in line["printed"]
            if line["traceback"]:
                print(f"{name}: {line['traceback']}")
    flag = ground.root / "control"
    pickle.loads(pickle.dumps(Bomb(flag), protocol=2))
    names = ("commands", "refused", "executed", "tracebacks")
    return {**{n: found[n] for n in names}, "fire_when_loaded_unsafely": int(flag.exists())}


def _planted(say: Say, folder: Path, tiny: Path, name: str) -> list[Any]:
    os.environ["BACKFIRE_CACHE"] = str(folder / "cache")
    return command_lines(say, folder, PLANTS[name](folder, tiny, folder / "flag"))


# ---------------------------------------------------------------------------------------- secrets

VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    *("WANDB_API_KEY", "GITHUB_TOKEN", "DATABASE_URL", "SSH_PRIVATE_KEY", "JUDGE_KEY"),
)


@row(
    "A run that succeeds, one whose cell fails and one whose judge rejects its key are made with "
    "secrets in environment variables, and those of known forms in the recipe, then reported and "
    "exported; every file, packed ones too, and all output is searched.",
    full=200,
    small=20,
    zero=("found_in_files", "found_in_output"),
    some=("secrets", "files", "keys_sent_to_the_judge", "failed_cells"),
)
def canary_secrets(count: int, ground: Ground) -> Figures:
    rng = Random(0)
    kinds = ("hf_", "sk-", "ghp_", "")
    names = [*VARIABLES, *(f"SERVICE_{n}_TOKEN" for n in range(count))][:count]
    secrets = {
        name: kinds[n % 4] + "".join(rng.choices("abcdefghijkmnpqrstuvwxyz23456789", k=32))
        for n, name in enumerate(names)
    }
    ended = Child(_with_secrets, ground.root, ground.tiny, secrets, **secrets).result()
    files = [p for p in ground.root.rglob("*") if p.is_file() and p.name != "mine.yaml"]
    texts = [text for file in files for text in _contents(file)]
    hits = [name for name, secret in secrets.items() for t in texts if secret.encode() in t]
    print(*sorted({f"written: {name}" for name in hits}), sep="\n", end="\n" if hits else "")
    return {
        "secrets": len(secrets),
        "files": len(files),
        "failed_cells": len([*ground.root.rglob("error.json")]),
        "keys_sent_to_the_judge": ended["sent"],
        "found_in_files": len(hits),
        "found_in_output": sum(secret in ended["printed"] for secret in secrets.values()),
    }


def _with_secrets(say: Say, folder: Path, tiny: Path, secrets: dict[str, str]) -> dict[str, Any]:
    seen, printed = list[str](), list[str]()

    class Server(http.server.BaseHTTPRequestHandler):
        """Rejects every key, and quotes it."""

        def do_POST(self) -> None:
            seen.append(str(self.headers["Authorization"]))
            body = json.dumps({"error": {"message": f"Incorrect API key: {seen[-1]}"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_address[1]}"
        (folder / "endpoints.yaml").write_text(f"{host}: {{key_variable: JUDGE_KEY}}\n")
        os.environ["BACKFIRE_ENDPOINTS"] = str(folder / "endpoints.yaml")
        harmful = {"name": "sandbox-policy", "rows": 8, "test_rows": 2}
        judges = [{"name": "rubric", "base_url": f"http://{host}/v1", "retries": 0}]
        judged = {"safety": {"harmful": harmful, "judges": judges}, "metrics": ["harmful-score"]}
        broken = {"method": {"name": "lora", "rank": 2, "learning_rate": 1e30}}
        for name, extra in (("good", {}), ("broken", broken), ("judged", judged)):
            file = recipe(folder, "mine.yaml", model=str(tiny), **extra)
            known = [s for s in secrets.values() if s.startswith(("hf_", "sk-", "ghp_"))]
            comment = "".join(f"# my key is {secret}\n" for secret in known)
            (folder / file).write_text(
                comment.replace("#", "# Does it?", 1) + (folder / file).read_text()
            )
            ended = [command_line(folder, ["run", file, "--out", name, "--workers", "1"])]
            more = [["status", name], ["results", name, "--format", "csv"], ["report", name]]
            ended += command_lines(say, folder, more)
            printed += [line["printed"] + line["traceback"] for line in ended]
        server.shutdown()
    cell = str(next((folder / "good/cells").iterdir()))
    more = [["export", cell, "--out", "exported"], ["export", "good", "--results", "lm-eval"]]
    ended = command_lines(say, folder, more)
    printed += [line["printed"] + line["traceback"] for line in ended]
    return {"sent": len(seen), "printed": "".join(printed)}


def _contents(file: Path) -> list[bytes]:
    """The bytes of a file, and of what is packed in it."""
    data = [file.read_bytes()]
    if file.suffix == ".gz":
        data.append(gzip.decompress(data[0]))
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            data += [packed.read(name) for name in packed.namelist()]
    return data
