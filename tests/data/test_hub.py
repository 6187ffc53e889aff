"""The hub, replaced by a local server: its requests, and the errors made of its refusals."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from backfire.errors import UserError
from tests.helpers.data_files import dataset, jsonl

pytestmark = pytest.mark.slow


class ClassLabel:
    names = ("negative", "positive")

    def __init__(self):
        self.names = list(self.names)


class FakeHubSet(list):
    features = {"sentence": None, "label": ClassLabel()}  # noqa: RUF012


@pytest.fixture
def hub(monkeypatch):
    import datasets

    calls = []

    def load(path, name=None, **options):
        assert "trust_remote_code" not in options
        calls.append((path, name, options))
        rows = [{"idx": n, "sentence": f"s{n}", "label": n % 2} for n in range(4)]
        if options["split"] == "test":
            rows[2]["label"] = -1
        return FakeHubSet(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub_sets(hub):
    data = dataset("sst2", revision="abc")
    assert [row.label for row in data.load("train")] == ["negative", "positive"] * 2
    assert data.load("test")[0].id == "sst2-validation-1"
    assert [options["split"] for _, _, options in hub] == ["train", "validation"]
    assert all(options["revision"] == "abc" for _, _, options in hub)
    with pytest.raises(UserError, match="stanfordnlp/sst2, line 3: it has no label"):
        dataset("sst2", test_split="test").load("test")


def test_hub_sets_that_name_their_classes_need_no_labels(hub):
    rows = dataset(hub="me/reviews", columns={"text": "sentence", "label": "label"}).load("train")
    assert rows[0].candidates == ("negative", "positive")


def test_converted_branch_keeps_one_folder_per_config(hub):
    dataset("multilingual-sentiment", hub_config="german", group=None).load("train")
    path, name, options = hub[0]
    assert (path, name, options["data_dir"]) == ("tyqiangz/multilingual-sentiments", None, "german")
    dataset(hub="me/set", hub_config="german").load("train")
    assert hub[1][1] == "german" and hub[1][2]["data_dir"] is None


def test_local_files_come_before_the_hub(hub, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"t{n}", "label": "positive"} for n in range(9)])
    assert dataset("sst2", train=path, test=path).load("test")[0].input == "t0"
    assert dataset("sst2", train=path, test_share=0.5).load("test")
    assert not hub


@pytest.mark.parametrize("offline", ["1", ""])
def test_hub_errors_are_one_sentence(monkeypatch, offline):
    import datasets

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'meta/secret' is a gated dataset on the Hub. You must be authenticated.\nmore"
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError) as caught:
        dataset(hub="meta/secret").load("train")
    sentence = str(caught.value)
    assert "https://huggingface.co/datasets/meta/secret" in sentence and "HF_TOKEN" in sentence
    assert "gated dataset" in sentence and "\n" not in sentence
    assert ("HF_HUB_OFFLINE is set" in sentence) == bool(offline)


# --------------------------------------------------------------------- a server that refuses all

REFUSALS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "plain": (401, None)}
REFUSALS["forbidden"] = (403, None)  # a token that may not read this
ASK = """
from backfire.errors import UserError
from backfire.experiment import Model
from backfire.model.source import fetch
from backfire.registry import build

for name in {names}:
    for kind, ask in (
        ("model", lambda: fetch(Model(name=name), weights=False)),
        ("data", lambda: build("datasets", {{"name": "files", "hub": name}}).load("train")),
    ):
        try:
            ask()
        except UserError as error:
            print(f"{{kind}} {{name}}: {{error}}")
"""


@pytest.fixture
def refusing(tmp_path):
    """A hub on this machine; gives the (path, Authorization) of what it was asked."""
    asked = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = [v for name, v in REFUSALS.items() if f"meta/{name}" in self.path]
            status, why = found[0] if found else (404, None)  # what the library asks for itself
            if found:
                asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            if why:
                self.send_header("X-Error-Code", why)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def ask(address, tmp_path, **settings):
    """What each model and set is answered, in a process that reads the settings anew."""
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    env = {name: value for name, value in env.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    code = ASK.format(names=[f"meta/{name}" for name in REFUSALS])
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=True)
    lines = output.stdout.splitlines()
    assert len(lines) == 2 * len(REFUSALS) and not output.stderr, "one sentence for each, no more"
    return dict(line.split(": ", 1) for line in lines)


def test_refusals_name_the_page_and_the_token_is_sent(refusing, tmp_path):
    address, asked = refusing
    output = ask(address, tmp_path, HF_TOKEN="hf_secret")
    assert len(asked) >= len(output) and {token for _, token in asked} == {"Bearer hf_secret"}
    for name in REFUSALS:
        assert f"https://huggingface.co/meta/{name}" in output[f"model meta/{name}"]
        assert f"https://huggingface.co/datasets/meta/{name}" in output[f"data meta/{name}"]
        assert "HF_TOKEN" in output[f"data meta/{name}"]
    assert not any("hf_secret" in sentence for sentence in output.values())
    assert "is gated: request access at" in output["model meta/gated"]
    assert "is a gated dataset" in output["data meta/gated"]
    assert "if it is private or gated, set HF_TOKEN" in output["model meta/private"]
    assert "401" in output["model meta/plain"] and "401" in output["data meta/plain"]


def test_without_a_token_none_is_sent(refusing, tmp_path):
    address, asked = refusing
    ask(address, tmp_path)
    assert asked and {token for _, token in asked} == {None}


def test_offline_the_hub_is_not_contacted(refusing, tmp_path):
    address, asked = refusing
    output = ask(address, tmp_path, HF_HUB_OFFLINE="1", HF_TOKEN="hf_secret")
    assert not asked
    assert all("HF_HUB_OFFLINE is set" in s and "https://" in s for s in output.values())
