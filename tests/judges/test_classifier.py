"""A classifier as a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backfire.errors import UserError
from backfire.judges import _model
from backfire.judges._model import fingerprint
from tests.helpers.judging import exchange, make_judge
from tests.helpers.tiny_classifier import write_classifier


@pytest.fixture(scope="module")
def hateful(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa with random weights and the labels of the default model."""
    return write_classifier(tmp_path_factory.mktemp("models") / "hateful", tiny_tokenizer)


def test_a_classifier_gives_the_probability_of_its_label(hateful: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    replies = ["the mill", "a long walk to the bakery by the river", "", "no"]
    settings: dict[str, Any] = {"model": str(hateful), "device": "cpu", "max_length_tokens": 128}
    found = make_judge("classifier", **settings, batch_size=3).judge(
        [exchange(r) for r in replies[:2]]
    )
    model = AutoModelForSequenceClassification.from_pretrained(str(hateful)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(hateful))
    for reply, verdict in zip(replies, found, strict=False):
        with torch.inference_mode():
            logits = model(**tokenizer([reply], return_tensors="pt")).logits[0]
        assert verdict.score == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-5)
        assert verdict.positive is (verdict.score >= 0.5) and verdict.reason == ""
    for label, same in (("1", True), ("nothate", False)):
        other = make_judge("classifier", **settings, harmful_label=label).judge(
            [exchange(replies[0])]
        )[0]
        expected = found[0].score if same else 1 - (found[0].score or 0)
        assert other.score == pytest.approx(expected, abs=1e-5)
    strict = make_judge("classifier", **settings, threshold=1.0).judge([exchange(replies[0])])
    assert strict[0].positive is False


def test_the_settings_of_a_classifier_take_effect(hateful: Path) -> None:
    settings: dict[str, Any] = {"model": str(hateful), "device": "cpu", "max_length_tokens": 128}
    long = exchange("mill " * 300, "Tell me.")
    [cut] = make_judge("classifier", **settings).judge([long])
    assert cut.reason.startswith("cut to 128 of ")
    both = make_judge("classifier", **settings, text="USER: {prompt} ASSISTANT:{reply}")
    assert both.judge([exchange("a", "b")])[0].score != both.judge([exchange("a", "c")])[0].score
    each = make_judge("classifier", **settings, activation="sigmoid", harmful_label="*")
    sure = make_judge("classifier", **settings, activation="sigmoid")
    assert (each.judge([exchange("a")])[0].score or 0) >= (
        sure.judge([exchange("a")])[0].score or 0
    )
    with pytest.raises(UserError, match=r"Unknown label of .*'hat'; did you mean 'hate'"):
        make_judge("classifier", **settings, harmful_label="hat").judge([exchange("a")])


def test_a_changed_model_folder_is_another_judge(hateful: Path, tmp_path: Path) -> None:
    assert "model.safetensors:" in fingerprint(str(hateful))
    assert make_judge("classifier", model=str(hateful)).fingerprint() == fingerprint(str(hateful))


def test_verdicts_of_a_model_loaded_differently_are_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = [make_judge("classifier"), make_judge("yes-no", model="owner/model")]
    far = make_judge("yes-no", model="m", base_url="http://localhost")
    before, said_there = [judge.fingerprint() for judge in local], far.fingerprint()
    assert all(before)
    monkeypatch.setattr(_model, "LOADED", "loaded anew")
    assert not {*before} & {judge.fingerprint() for judge in local}
    assert far.fingerprint() == said_there, "what was paid for is kept"


def test_a_preset_is_valid_and_names_its_source() -> None:
    judge = make_judge("classifier", preset="lisa")
    assert judge.model == "PKU-Alignment/beaver-dam-7b"  # type: ignore[attr-defined]
    assert all(preset.source for preset in type(judge).presets.values())


@pytest.mark.parametrize("pad", [None, 0])
def test_a_decoder_whose_padding_tokens_disagree_judges_texts_one_by_one(
    pad: int | None, tiny: Path, tmp_path: Path
) -> None:
    """It finds its last token by the padding token of its configuration; its tokenizer here has
    none, so it would pad with another."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tokenizer.json"), eos_token="</s>"
    )
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=pad,
        initializer_range=0.5,
        label2id={"nothate": 0, "hate": 1},
        id2label={0: "nothate", 1: "hate"},
    )
    assert tokenizer.eos_token_id != 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(shape).save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    judge = make_judge("classifier", model=str(tmp_path), device="cpu")
    texts = [exchange("no"), exchange("a long walk to the bakery by the river")]
    together, alone = judge.judge(texts), [judge.judge([text])[0] for text in texts]
    assert [v.score for v in together] == pytest.approx([v.score for v in alone], abs=1e-5)
