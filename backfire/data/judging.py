"""What judges that are models share: the text they are shown, and how they are loaded."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from backfire.data.beside import as_words, read_text, written
from backfire.data.load import file_hash
from backfire.errors import CellError, UserError

_PLACES = re.compile(r"\{(prompt|reply)\}")


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is needed, or @PATH")
    return value


Text = Annotated[
    str,
    PlainValidator(read_text, json_schema_input_type=str),
    AfterValidator(_is_text),
    PlainSerializer(written),
]
"""A text in which `{prompt}` and `{reply}` stand for those; `@PATH` reads it from a file beside the
recipe."""


def _listed(value: Any) -> Any:
    """The words or phrases; of `@PATH`, the lines of that file. Blank ones do not count."""
    read = read_text(value)
    words = read.splitlines() if isinstance(read, str) else read
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError("a list of texts is needed, or @PATH")
    kept = dict.fromkeys(word.strip() for word in words if word.strip())
    if not kept:
        raise ValueError("at least one word is needed")
    return as_words(read, kept)


Words = Annotated[
    tuple[str, ...],
    PlainValidator(_listed, json_schema_input_type=tuple[str, ...] | str),
    PlainSerializer(written),
]
"""Words or phrases; `@PATH` reads them from a file beside the recipe, one a line."""


def fill(text: str, prompt: str, reply: str) -> str:
    """The text with prompt and reply put in, once each: what they hold themselves stays as it is.

    Raises:
        UserError: the text has no place for the reply.
    """
    if "{reply}" not in text:
        raise UserError("A judge's text needs {reply}, where the reply to be judged is put in.")
    values = {"prompt": prompt, "reply": reply}
    return _PLACES.sub(lambda match: values[match[1]], text)


def fingerprint(model: str) -> str:
    """Hashes of the files of a model in a local folder; empty for a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return " ".join(f"{file.name}:{file_hash(file)}" for file in files)


@lru_cache(maxsize=1)
def load(
    task: Literal["SequenceClassification", "CausalLM"],
    name: str,
    revision: str | None,
    device: str,
    files: str = "",
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub id, the last ones kept in memory; `files` is their
    fingerprint, so that a folder whose files changed is loaded again. No code of theirs is run.

    Raises:
        UserError: they cannot be loaded, in one sentence.
    """
    import torch
    import transformers

    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where.startswith("cuda") else torch.float32
    settings: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **settings)
        kind = getattr(transformers, f"AutoModelFor{task}")
        model = kind.from_pretrained(path, dtype=dtype, **settings).to(where).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"The judge's model '{name}' cannot be loaded: {first}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def answers(
    prompts: list[str],
    name: str,
    *,
    revision: str | None,
    device: str,
    chat: bool,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What a causal language model run here answers to each prompt, greedily decoded.

    Raises:
        CellError: a prompt is longer than the model can read.
    """
    import torch

    model, tokenizer = load("CausalLM", name, revision, device, fingerprint(name))
    if chat and tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    special = not (chat and tokenizer.chat_template)  # a chat template writes its own
    room = getattr(model.config, "max_position_embeddings", None)
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            prompts[start : start + batch_size],
            padding=True,
            padding_side="left",
            add_special_tokens=special,
            return_token_type_ids=False,
            return_tensors="pt",
            verbose=False,
        ).to(model.device)
        width = batch["input_ids"].shape[1]
        if room and width + max_new_tokens > room:
            raise CellError(
                "bad-data",
                f"The judge's model '{name}' reads {room} tokens, but a prompt with its answer "
                f"takes {width + max_new_tokens}; shorten evaluation.max_new_tokens.",
            )
        with torch.inference_mode():
            ids = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        found += tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return found
