"""Tokenizers as the renderer needs them: ids of plain text, special ids, chat template.

Uses the `tokenizers` backend directly, so that rendering rows does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from backfire.errors import UserError

_MODELS = ("tokenizer.model", "spiece.model", "tiktoken.model")
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; `bos` is None for models trained without one (GPT-2, Qwen)."""

    backend: tokenizers.Tokenizer
    eos: str
    bos: str | None
    chat_template: str | None
    controls: tuple[str, ...]
    """Every special token as text, such as `<|im_start|>`."""
    stops: tuple[int, ...] = ()
    """Ids that end a reply in addition to the end token, such as a chat model's end of turn."""
    special: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the name a chat template uses: `bos_token`, `eos_token`, `pad_token` ..."""

    @property
    def added(self) -> tuple[str, ...]:
        """Added tokens that are not control tokens, except white space."""
        tokens = self.backend.get_added_tokens_decoder().values()
        return tuple(str(t.content) for t in tokens if not t.special and str(t.content).strip())

    @property
    def eos_id(self) -> int:
        return self._id(self.eos)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a reply."""
        return tuple(dict.fromkeys((self.eos_id, *self.stops)))

    @property
    def bos_id(self) -> int | None:
        return None if self.bos is None else self._id(self.bos)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"The tokenizer's special token '{token}' is not in its vocabulary.")
        return number

    def encode(self, text: str, *, controls: bool = False) -> list[int]:
        """Ids of `text`, without BOS or EOS. Control tokens in it are plain text unless `controls`
        is set."""
        return self.encode_batch([text], controls=controls)[0]

    def encode_batch(self, texts: list[str], *, controls: bool = False) -> list[list[int]]:
        self.backend.encode_special_tokens = not controls
        return [
            item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def shown(self, ids: list[int]) -> str:
        """Text of `ids`, including control tokens."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def written(self, text: str) -> str:
        """The text after encoding and decoding: some tokenizers drop capitals or accents, or
        normalize Unicode."""
        return self.decode(self.encode(text))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model folder.

    Raises:
        UserError: there is none, or it has no end token (its model could never stop).
    """
    config = _read(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(f"{folder}/tokenizer.json is not a tokenizer: {error}") from None
        backend.no_truncation()
        backend.no_padding()
    elif any((folder / name).is_file() for name in (*_MODELS, "vocab.json")):
        backend = _convert(folder)
    else:
        raise UserError(f"No tokenizer in {folder}: tokenizer.json or tokenizer.model is missing.")
    specials = {**_read(folder / "special_tokens_map.json"), **config}
    eos = _text(specials.get("eos_token")) or _by_id(
        backend, _read(folder / "config.json").get("eos_token_id")
    )
    if eos is None:
        raise UserError(
            f"The tokenizer in {folder} has no end token (eos_token), so replies could never end."
        )
    controls = tuple(
        str(t.content) for t in backend.get_added_tokens_decoder().values() if t.special
    )
    return Tokenizer(
        backend=backend,
        eos=eos,
        bos=_leading_token(
            backend, _text(specials.get("bos_token")), specials.get("add_bos_token")
        ),
        chat_template=_chat_templates(folder, config).get("default"),
        controls=controls,
        stops=_stops(folder),
        special={name: text for name in _SPECIAL if (text := _text(specials.get(name)))},
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name, in every format; as in transformers, separate files come first, and
    a processor's template (chat_template.json) counts only if the tokenizer has none."""
    templates: dict[str, str] = {}
    for settings in (_read(folder / "chat_template.json"), config):
        value = settings.get("chat_template")
        if isinstance(value, list):
            value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        named = value if isinstance(value, dict) else {"default": value}
        templates |= {name: text for name, text in named.items() if isinstance(text, str)}
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    return templates | ({"default": file.read_text(encoding="utf-8")} if file.is_file() else {})


def _stops(folder: Path) -> tuple[int, ...]:
    """The ids that end a reply by the model's own settings."""
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        stops += [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    return tuple(dict.fromkeys(stops))


def _leading_token(backend: tokenizers.Tokenizer, bos: str | None, add_bos: Any) -> str | None:
    """The BOS token, if this tokenizer puts one before a text."""
    if bos is None:
        return None
    ids = backend.encode("a", add_special_tokens=True).ids
    adds = add_bos is True or (add_bos is None and ids and ids[0] == backend.token_to_id(bos))
    return bos if adds else None


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Slow formats are converted by transformers (this imports torch)."""
    for name in _MODELS:
        if (folder / name).is_file() and (missing := _missing(folder / name)):
            raise UserError(
                f"{folder} has {name} but no tokenizer.json; to read it, "
                f"pip install {' '.join(missing)}."
            )
    from transformers import AutoTokenizer

    try:
        backend: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
        return backend
    except Exception as error:
        raise UserError(f"The tokenizer in {folder} cannot be read: {error}") from None


def _missing(file: Path) -> list[str]:
    """The packages that are needed to read the file and not installed. A `tokenizer.model` is
    either sentencepiece's or, as base64 lines, tiktoken's."""
    first = file.read_bytes().partition(b"\n")[0]
    is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", first) is not None
    needed = {"tiktoken": "tiktoken"} if is_tiktoken else _SENTENCEPIECE
    return [package for module, package in needed.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing, or it was set to None
        return False


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON.") from None
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _by_id(backend: tokenizers.Tokenizer, number: Any) -> str | None:
    return backend.id_to_token(number) if isinstance(number, int) else None
