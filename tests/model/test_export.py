"""An exported model is complete: other programs find its tokenizer, whatever its format."""

from __future__ import annotations

from pathlib import Path

from backfire.model.export import copy_model


def test_an_exported_adapter_has_the_whole_tokenizer(tmp_path: Path) -> None:
    tokenizer = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
    base, tuned, out = (tmp_path / name for name in ("base", "tuned", "out"))
    for folder in (base, tuned, out):
        folder.mkdir()
    for name in (*tokenizer, "config.json", "model.safetensors"):
        (base / name).write_text("of the base")
    for name in ("adapter_config.json", "tokenizer_config.json", "summary.json"):
        (tuned / name).write_text("of the adapter")
    copy_model(tuned, base, out)
    assert {file.name for file in out.iterdir()} == {*tokenizer, "adapter_config.json"}
    assert (out / "tokenizer_config.json").read_text() == "of the adapter"
