"""A tokenizer as the renderer needs it: ids of plain text, special ids, chat template.

Works on the `tokenizers` backend directly, so that looking at rendered rows does not import torch.
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
    """`bos` is None for models that are not trained with one (GPT-2, Qwen)."""

    backend: tokenizers.Tokenizer
    eos: str
    bos: str | None
    chat_template: str | None
    controls: tuple[str, ...]
    """Every special token as text, such as `<|im_start|>`."""
    stops: tuple[int, ...] = ()
    """Ids that end a reply beside the end token, such as a chat model's end of turn."""
    special: Mapping[str, str] = field(default_factory=dict)
    """What a chat template knows by name: `bos_token`, `eos_token`, `pad_token` ..."""

    @property
    def added(self) -> tuple[str, ...]:
        """Tokens beside the vocabulary that are no control tokens, except white space."""
        found = self.backend.get_added_tokens_decoder().values()
        return tuple(str(t.content) for t in found if not t.special and str(t.content).strip())

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
        """Ids of `text`, without BOS or EOS. Control tokens in it are text unless `controls`."""
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
        """Text of `ids` with the control tokens in it."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def written(self, text: str) -> str:
        """The text as this tokenizer writes it: some know no capitals, no accents, or one Unicode
        form."""
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
            raise UserError(f"{folder}/tokenizer.json is no tokenizer: {error}") from None
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
            f"The tokenizer in {folder} names no end token (eos_token), so replies could never end."
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
    """By name, of every form they come in; as in transformers, files of their own go first, and
    a processor's (chat_template.json) is only taken where the tokenizer has none."""
    found: dict[str, str] = {}
    for settings in (_read(folder / "chat_template.json"), config):
        value = settings.get("chat_template")
        if isinstance(value, list):
            value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        named = value if isinstance(value, dict) else {"default": value}
        found |= {name: text for name, text in named.items() if isinstance(text, str)}
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    return found | ({"default": file.read_text(encoding="utf-8")} if file.is_file() else {})


def _stops(folder: Path) -> tuple[int, ...]:
    """What the model's own settings end a reply at: one id or several."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    return tuple(dict.fromkeys(found))


def _leading_token(backend: tokenizers.Tokenizer, bos: str | None, asked: Any) -> str | None:
    """The BOS token, if this tokenizer puts one in front of a text."""
    if bos is None:
        return None
    ids = backend.encode("a", add_special_tokens=True).ids
    return (
        bos
        if asked is True or (asked is None and ids and ids[0] == backend.token_to_id(bos))
        else None
    )


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Slow formats are converted by transformers (this imports torch)."""
    for name in _MODELS:
        if (folder / name).is_file() and (missing := _missing(folder / name)):
            raise UserError(
                f"{folder} has a {name} but no tokenizer.json; to read it, "
                f"pip install {' '.join(missing)}."
            )
    from transformers import AutoTokenizer

    try:
        backend: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
        return backend
    except Exception as error:
        raise UserError(f"The tokenizer in {folder} cannot be read: {error}") from None


def _missing(file: Path) -> list[str]:
    """The packages that reading the file takes and that are not installed. A `tokenizer.model` is
    either sentencepiece's or, as base64 lines, tiktoken's."""
    first = file.read_bytes().partition(b"\n")[0]
    is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", first) is not None
    needed = {"tiktoken": "tiktoken"} if is_tiktoken else _SENTENCEPIECE
    return [package for module, package in needed.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing, or it was set to None
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
