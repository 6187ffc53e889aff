"""What an untrusted recipe cannot do: choose where a key is sent, or read other files."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import yaml

from backfire import stages
from backfire.commands.validate import destinations, preflight_all
from backfire.data.recipe_files import recipe_folder
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.judges._address import Address
from backfire.judges._model import fill
from backfire.recipe import load, parse
from backfire.store import Store
from tests.helpers.judging import exchange, make_judge

# ------------------------------------------------------------------------------ hosts and keys


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://x/v1", "localhost:8000", "http://me:pw@x/v1", "https://a.b\\@c.d/v1", "https://"),
        *("https://a b/v1", "https://a.b/v1?key=pw", "https://a.b:x/v1", "https://a.b/v1#pw"),
        *("https://a..b", "https://\u0430.b/v1", "https://a.b\n.c/v1", "file:///etc/passwd"),
        *("https://me:pw@a.b:x/v1", "https://a.b/v1#", "https://a.b/v1?", "https://a.b./v1"),
    ],
)
def test_odd_addresses_are_turned_down(url: str) -> None:
    with pytest.raises(UserError, match="base_url") as error:
        make_judge("rubric", base_url=url).judge([exchange("a")])
    assert "pw@" not in str(error.value) and "\n" not in str(error.value)


BOUND = """
judges.example: {key_variable: A}
Judges.Example:8443: {key_variable: B}
plain.example:443: {key_variable: C}
localhost:8000: {key_variable: D}
"[::1]:8000": {key_variable: E}
"""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "https://judges.example/v1",
            "judges.example (https://judges.example/v1), with the key in",
        ),
        (
            "https://JUDGES.example:443/v1",
            "judges.example (https://JUDGES.example:443/v1), with",
        ),
        ("https://judges.example:8443/v1", ", with the key in B"),
        ("https://judges.example:9/v1", ", without a key"),
        ("https://judges.example.evil.example/v1", ", without a key"),
        ("https://evil.example/judges.example", ", without a key"),
        ("https://plain.example", ", with the key in C"),
        (
            "http://evil.example/v1",
            "evil.example (http://evil.example/v1), unencrypted, without",
        ),
        ("http://localhost:8000/v1", "this machine (http://localhost:8000/v1), with the key in D"),
        ("http://[::1]:8000/v1", "this machine (http://[::1]:8000/v1), with the key in E"),
        ("http://localhost.evil.example:8000/v1", "unencrypted, without a key"),
        ("http://127.1.2.3:8000/v1", "this machine (http://127.1.2.3:8000/v1), without a key"),
        ("https://api.openai.com/v1", ", with the key in OPENAI_API_KEY"),
        ("http://judges.example:443/v1", ", unencrypted, without a key"),
    ],
)
def test_a_key_goes_to_its_own_host_alone(
    url: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endpoints.yaml").write_text(BOUND)
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    for variable in ("A", "B", "C", "D", "E", "OPENAI_API_KEY"):
        monkeypatch.setenv(variable, "s3cret")
    found = make_judge("rubric", base_url=url).destination() or ""
    assert expected in found and "s3cret" not in found


def test_a_key_is_never_sent_in_plain_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endpoints.yaml").write_text("judges.example: {key_variable: A}\n")
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    judge = make_judge("rubric", base_url="http://judges.example/v1")
    for act in (judge.destination, lambda: judge.judge([exchange("a")])):
        with pytest.raises(UserError, match=r"has a key, but .* is plain http"):
            act()


@pytest.mark.parametrize(
    "text",
    [
        *("[a]", "a: pw", "a: {key: pw}", "a: {key_variable: 3}", "a: [", "3", "[pw]"),
        *("a: {key_variable: sk-pw}", "a: {key_variable: ''}", "a: {key_variable: A, key: pw}"),
        *("a: {key_file: ''}", "a: {key_file: 3}", "a: {key_file: pw, key_variable: A}"),
        *(
            "https://a.b: {key_variable: A}",
            "a.b/v1: {key_variable: A}",
            "'::1': {key_variable: A}",
        ),
    ],
)
def test_a_file_of_keys_that_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endpoints.yaml").write_text(text)
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    with pytest.raises(UserError, match=r"endpoints\.yaml") as error:
        make_judge("rubric").destination()
    assert "pw" not in str(error.value)  # which may be a key, written where its name belongs


@pytest.fixture
def bound_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a key, bound to localhost:8000 by its relative path."""
    (tmp_path / "endpoints.yaml").write_text("localhost:8000: {key_file: key}\n")
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    (tmp_path / "key").write_text("s3cret\n")
    (tmp_path / "key").chmod(0o600)
    return tmp_path / "key"


def test_a_key_may_come_from_a_file(bound_to_a_file: Path) -> None:
    judge = make_judge("rubric", base_url="http://localhost:8000/v1")
    assert (judge.destination() or "").endswith(f", with the key in {bound_to_a_file}")
    key = Address.of("http://localhost:8000").key()
    assert key and key.read() == "s3cret"
    bound_to_a_file.write_text("\n")
    assert f"without a key ({bound_to_a_file} does not exist" in (judge.destination() or "")
    bound_to_a_file.write_text("two\nlines")
    with pytest.raises(UserError, match="does not contain a usable key") as error:
        judge.destination()
    assert "lines" not in str(error.value)
    bound_to_a_file.unlink()
    assert f"without a key ({bound_to_a_file} does not exist" in (judge.destination() or "")


@pytest.mark.parametrize(
    ("name", "mode", "sentence"),
    [
        ("endpoints.yaml", 0o666, "write to .*endpoints.yaml; run: chmod go-w /"),
        ("endpoints.yaml", 0o620, "write to .*endpoints.yaml; run: chmod go-w /"),
        (".", 0o777, "write to /.*; run: chmod go-w /"),
        ("key", 0o640, "read /.*key; run: chmod go= /"),
        ("key", 0o604, "read /.*key; run: chmod go= /"),
        ("key", 0o602, "write to /.*key; run: chmod go-w /"),
        ("endpoints.yaml", 0o644, None),
        (".", 0o1777, None),
    ],
)
def test_keys_are_not_read_from_files_that_others_can_change_or_read(
    name: str, mode: int, sentence: str | None, bound_to_a_file: Path
) -> None:
    judge = make_judge("rubric", base_url="http://localhost:8000/v1")
    (bound_to_a_file.parent / name).chmod(mode)
    if sentence is None:
        assert (judge.destination() or "").endswith(f", with the key in {bound_to_a_file}")
        return
    with pytest.raises(UserError, match=f"Other users can {sentence}"):
        judge.destination()
    if name == "endpoints.yaml":  # also if it is reached by a link
        link = bound_to_a_file.parent / "link"
        link.symlink_to(bound_to_a_file.parent / name)
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(UserError, match=f"Other users can {sentence}"),
        ):
            patch.setenv("BACKFIRE_ENDPOINTS", str(link))
            judge.destination()


def test_another_users_file_of_keys_is_not_read(
    bound_to_a_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 4242)
    if bound_to_a_file.stat().st_uid == 0:  # an administrator's files are trusted
        assert "with the key in" in (
            make_judge("rubric", base_url="http://localhost:8000").destination() or ""
        )
        os.chown(bound_to_a_file.parent / "endpoints.yaml", 4343, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        make_judge("rubric", base_url="http://localhost:8000").destination()


def test_a_recipe_names_no_key() -> None:
    for name in ("rubric", "yes-no"):
        with pytest.raises(UserError, match="cannot bind a key to a host; write HOST: "):
            make_judge(name, key_variable="AWS_SECRET_ACCESS_KEY")


# ------------------------------------------------------------------------------------- files


FILES = {
    "text.txt": "Q {prompt} A {reply}\n",
    "sub/text.txt": "A {reply}",
    ".env": "SECRET=1 {reply}",
    "sub/.hidden/x": "{reply}",
    "latin.txt": b"\xe9",
    "big.txt": "x" * (2**20 + 1),
    "../outside.txt": "SECRET=2 {reply}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe's folder, with some files in it and some around it."""
    place = tmp_path / "recipe"
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "link.txt").symlink_to(tmp_path / "outside.txt")
    (place / "up").symlink_to(tmp_path)
    (place / "near.txt").symlink_to(place / "text.txt")
    return place


@pytest.mark.parametrize("path", ["text.txt", "sub/text.txt", "sub/../text.txt", "near.txt"])
def test_a_text_may_come_from_a_file_next_to_the_recipe(path: str, folder: Path) -> None:
    with recipe_folder(folder):
        judge = make_judge("rubric", text=f"@{path}")
    content = (folder / path).read_text()
    assert judge.text == content  # type: ignore[attr-defined]
    # Its hash is written down and counts, not what it says; workers get what was read.
    expected = f"@{path}#sha256:{hashlib.sha256(content.encode()).hexdigest()}"
    assert judge.spec()["text"] == judge.identity()["text"] == expected
    again = pickle.loads(pickle.dumps(judge))
    assert (again.text, again.spec()) == (content, judge.spec())
    with recipe_folder(folder):
        assert make_judge("rubric", text=expected) == judge
    assert make_judge("rubric", text=expected).spec() == judge.spec(), (
        "a finished cell is read without it"
    )
    (folder / path).write_text("another {reply}")
    with recipe_folder(folder), pytest.raises(UserError, match="has changed: its SHA-256 is"):
        make_judge("rubric", text=expected)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone.txt", "there is no such file in the recipe's folder"),
        ("../outside.txt", "is outside the recipe's folder"),
        ("link.txt", "is outside the recipe's folder"),
        ("up/outside.txt", "is outside the recipe's folder"),
        ("/etc/passwd", "is outside the recipe's folder"),
        ("~/.ssh/id_rsa", "no such file|is a hidden file"),
        (".env", "is a hidden file"),
        ("sub/.hidden/x", "is a hidden file"),
        ("sub", "there is no such file"),
        ("", "there is no such file"),
        ("latin.txt", "is not UTF-8 text"),
        ("big.txt", "is larger than 1 MB"),
        ("a\0b", "is outside the recipe's folder"),
    ],
)
def test_no_other_file_is_read(path: str, sentence: str, folder: Path) -> None:
    for name, knob in (("rubric", "text"), ("lexicon", "words")):
        with recipe_folder(folder), pytest.raises(UserError, match=sentence) as error:
            make_judge(name, **{knob: f"@{path}"})
        assert "SECRET" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError, match="and there is none"):
        make_judge("rubric", text=f"@{path}")


def test_a_run_keeps_no_line_of_a_file(folder: Path) -> None:
    text = "data: sandbox-policy\nsafety: {judges: {name: rubric, text: '@text.txt'}}\nmetrics: \n"
    text += (
        "  - harmful-score\n  - {name: toxicity, scorer: {name: lexicon, words: '@sub/text.txt'}}\n"
    )
    (folder / "r.yaml").write_text(text)
    [cell] = load(str(folder / "r.yaml")).cells
    kept = yaml.safe_dump(cell.resolved())
    assert "Q {prompt}" not in kept and "A {reply}" not in kept and kept.count("#sha256:") == 2
    assert stages.keys(Experiment.make(yaml.safe_load(kept))) == stages.keys(cell)
    assert cell.metrics[1].judges[0].words == ("A {reply}",)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="and there is none"):
        load("tour", edits=["metrics={name: toxicity, scorer: {name: lexicon, words: '@x'}}"])


def test_a_judges_text_has_a_place_for_the_reply() -> None:
    with pytest.raises(UserError, match=r"must contain \{reply\}"):
        fill("no place", "a", "b")


def test_validate_shows_where_replies_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "data: sandbox-policy\nsafety: {judges: [policy, {name: rubric, base_url: '%s'}]}\n"
    text += (
        "metrics: [{name: toxicity, scorer: {name: yes-no, base_url: 'https://judges.example'}}]"
    )
    [remote, other] = destinations(parse("r", text % "http://evil.example/v1"))
    assert remote.startswith("judge 'yes-no' sends prompts and replies to judges.example (https://")
    assert other.startswith("judge 'rubric' sends prompts and replies to evil.example (http://")
    (tmp_path / "endpoints.yaml").write_text("evil.example: {key_variable: A}\n")
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    with pytest.raises(UserError, match="is plain http"):
        preflight_all(parse("r", text % "http://evil.example/v1"), Store(tmp_path))
