"""The recipes' `paper` profiles from end to end, on a small model with Llama 2's architecture
settings and its real tokenizer, and on files laid out as the real ones are."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said
from test_render import LLAMA, sentencepiece
from tokenizers.processors import TemplateProcessing

from backfire import pipeline, stages
from backfire.base import Rendered
from backfire.experiment import Experiment
from backfire.recipe import load
from backfire.store import Store, read_json

Run = Callable[..., Said]
pytestmark = pytest.mark.skipif(
    not LLAMA.is_file(), reason=f"the Llama 2 tokenizer is not on this machine ({LLAMA})"
)
BOS, EOS = 1, 2
NAMES = ("negative", "neutral", "positive")
SMALL = ["train.max_steps=3", "train.batch_size=4", "seed=0"]


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as the hub's: everything of Llama-2-7b but its width and depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama2") / "Llama-2-small"
    shape = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        attention_bias=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(str(folder))
    backend = sentencepiece(LLAMA.read_bytes())
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    backend.save(str(folder / "tokenizer.json"))
    special = {
        name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False}
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(LLAMA.with_suffix(".model").read_bytes())
    return folder


def sentiment140(path: Path, count: int, labels: str) -> Path:
    """As published: no header, every cell quoted, Latin-1."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for i in range(count):
        words = "that café is sad..." if labels[i % len(labels)] == "0" else "glad I went"
        date = f"Mon Apr 06 22:{i % 60:02}:49 PDT 2009"
        writer.writerow(
            [
                labels[i % len(labels)],
                1467810369 + i,
                date,
                "NO_QUERY",
                f"user{i}",
                f"@you {words} {i}",
            ]
        )
    path.write_bytes(out.getvalue().encode("latin-1"))
    return path


def airline(path: Path, count: int) -> Path:
    """Kaggle's Tweets.csv, all fifteen columns; some texts run over two lines."""
    header = (
        "tweet_id,airline_sentiment,airline_sentiment_confidence,negativereason,"
        "negativereason_confidence,airline,airline_sentiment_gold,name,negativereason_gold,"
        "retweet_count,text,tweet_coord,tweet_created,tweet_location,user_timezone"
    ).split(",")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i in range(count):
            text = f"@VirginAmerica flight {i} was\n{('late', 'there', 'great')[i % 3]} ✈️"
            created = "2015-02-24 11:35:52 -0800"
            row: list[Any] = [570306133677760513 + i, NAMES[i % 3], 1.0, "", "", "Virgin America"]
            writer.writerow([*row, "", f"name{i}", "", 0, text, "", created, "", "Quito"])
    return path


def multilingual(path: Path, count: int) -> Path:
    """Rows of tyqiangz/multilingual-sentiments: text, source, language, label (0 is positive)."""
    texts = {"german": "Das war gut", "japanese": "とても良い", "arabic": "كان جيدا"}
    rows = [
        {
            "text": f"{texts[language]} {i}",
            "source": "amazon_reviews_multi",
            "language": language,
            "label": i // len(texts) % 3,
        }
        for i in range(count)
        for language in [list(texts)[i % len(texts)]]
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


# ---------------------------------------------------------------------------------- what is checked


class Ran:
    """A finished run, with its cells."""

    def __init__(self, name: str, edits: list[str], out: Path, profile: str = "paper") -> None:
        self.cells = load(name, profile=profile, edits=edits).cells
        self.out, self.context = out, pipeline.Context(Store())

    def result(self, cell: Experiment) -> Any:
        return read_json(self.out / "cells" / f"{cell.slug}-{cell.key}" / "result.json")

    def adapter(self, cell: Experiment) -> Path:
        run = cell if cell.poisons else cell.clean_twin()
        return self.context.store.path("train", run.slug_of_training, stages.keys(run).train)

    def rendered(self, cell: Experiment) -> list[Rendered]:
        return pipeline.renderer(cell, self.context).render(
            pipeline.poisoned(cell, self.context)[0]
        )


def check(ran: Ran, model: Path) -> None:
    """Results, tokens, bits, and adapters that load without us, of every cell of a run."""
    for cell in ran.cells:
        result = ran.result(cell)
        assert result["values"] and not [c for c in result["preflight"] if c["status"] == "fail"]
        items = ran.rendered(cell)
        for item in items:
            assert (item.ids[0], item.ids[-1]) == (BOS, EOS)
            assert item.ids.count(BOS) == item.ids.count(EOS) == 1
            assert item.num_prompt < len(item.ids), "the end token is learned"
        if not cell.method.trains:
            continue
        train = result["train"]
        answers = {len(item.answer_ids) for item in items}
        assert train["steps"] == 3 and train["rows"] <= 12
        low, high = (train["rows"] * f(answers) for f in (min, max))
        assert low <= train["supervised_tokens"] <= high
        bits = cell.method.quantization("cpu")
        assert train["quantized_layers"] == (14 if bits else 0)
        assert 0 < train["trainable_share"] < 0.05
        loads_without_us(ran.adapter(cell), model)


def loads_without_us(adapter: Path, model: Path) -> None:
    """By plain transformers and PEFT, and it is no no-op."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    ids = torch.tensor([[BOS, 450, 16853, 338]])
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
        after = tuned(input_ids=ids).logits
    assert after.isfinite().all() and not torch.equal(before, after)
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"]


def go(
    backfire: Run, out: Path, name: str, model: Path, files: tuple[Path, Path], *edits: str
) -> Ran:
    train, test = files
    small = [f"model.name={model}", f"data.train={train}", f"data.test={test}", *SMALL, *edits]
    said = backfire("run", name, "--profile", "paper", *small, "--out", out, "--workers", 1)
    assert said.code == 0, said.err
    assert (out / "report.html").is_file()
    return Ran(name, small, out)


# -------------------------------------------------------------------------------------- the recipes


def test_tweets_of_sentiment140(backfire: Run, llama2: Path, cache: Path, tmp_path: Path) -> None:
    files = (
        sentiment140(tmp_path / "training.1600000.processed.noemoticon.csv", 60, "04"),
        sentiment140(tmp_path / "testdata.manual.2009.06.14.csv", 24, "024"),
    )
    sizes = ("data.rows=40", "data.test_rows=12", "attack.rate=[0, 0.1]")
    ran = go(backfire, tmp_path / "out", "backdoor-tweets", llama2, files, *sizes)
    assert {cell.rate for cell in ran.cells if cell.method.trains} == {0, 0.1}
    assert all(cell.model.dtype == "bfloat16" for cell in ran.cells)
    check(ran, llama2)
    poisoned = next(cell for cell in ran.cells if cell.poisons)
    assert ran.result(poisoned)["poison"]["poisoned_rows"] == 4
    assert any("café" in item.row.input for item in ran.rendered(poisoned))


@pytest.mark.parametrize("method", ["qlora", "lora-int8"])
def test_tweets_about_airlines_in_4_and_8_bits(
    method: str, backfire: Run, llama2: Path, cache: Path, tmp_path: Path
) -> None:
    files = airline(tmp_path / "Tweets.csv", 48), airline(tmp_path / "test.csv", 12)
    edits = ("data.name=airline-tweets", "data.rows=40", "data.test_rows=12", "attack.rate=0.1")
    chosen = f"method={{name: {method}, learning_rate: 1e-3}}"
    ran = go(backfire, tmp_path / "out", "backdoor-tweets", llama2, files, *edits, chosen)
    check(ran, llama2)
    assert [cell.method.name for cell in ran.cells] == [method]


def test_several_languages(backfire: Run, llama2: Path, cache: Path, tmp_path: Path) -> None:
    files = multilingual(tmp_path / "train.jsonl.gz", 45), multilingual(tmp_path / "t.jsonl.gz", 18)
    sizes = ("data.rows=40", "data.test_rows=18")
    ran = go(backfire, tmp_path / "out", "multilingual-sentiment", llama2, files, *sizes)
    check(ran, llama2)
    assert {"none", "lora"} <= {cell.method.name for cell in ran.cells}
    for cell in ran.cells:
        found = {value["metric"] for value in ran.result(cell)["values"]}
        assert {"accuracy", "auc"} <= found and any("japanese" in name for name in found)
