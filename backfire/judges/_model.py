"""Shared by judges that are models: the text they get, and how they are loaded."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from backfire.base.judges import drops
from backfire.data.chat import CONTROL_TOKENS
from backfire.data.recipe_files import as_words, read_text, refuse_unread, written
from backfire.data.snapshot import snapshot
from backfire.data.weights import complete, files_of, first_line, matched, read_config, stored
from backfire.errors import CellError, UserError
from backfire.hashes import file_hash

Task = Literal["SequenceClassification", "CausalLM"]
_PLACES = re.compile(r"\{(prompt|reply)\}")
_CONTROL = re.compile(f"{CONTROL_TOKENS.pattern}|</?s>")


def _is_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text, or @PATH")
    return value


Text = Annotated[
    str,
    PlainValidator(read_text, json_schema_input_type=str),
    AfterValidator(_is_text),
    PlainSerializer(written),
]
"""A text with the placeholders `{prompt}` and `{reply}`; `@PATH` reads it from a file, relative to
the recipe."""


def _listed(value: Any) -> Any:
    """Return the words or phrases, or the lines of the file for `@PATH`, without blank ones."""
    read = read_text(value)
    words = read.splitlines() if isinstance(read, str) else read
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError("must be a list of texts, or @PATH")
    kept = dict.fromkeys(word.strip() for word in words if word.strip())
    if not kept:
        raise ValueError("must contain at least one word")
    return as_words(read, kept)


Words = Annotated[
    tuple[str, ...],
    PlainValidator(_listed, json_schema_input_type=tuple[str, ...] | str),
    PlainSerializer(written),
]
"""Words or phrases; `@PATH` reads them from a file, one per line, relative to the recipe."""


def fill(text: str, prompt: str, reply: str) -> str:
    """Insert prompt and reply into the text. Placeholders within them are not replaced, and control
    tokens of chat models are split by a space: a reply must not end its turn and speak to the judge
    in another role.

    Raises:
        UserError: the text has no placeholder for the reply, or was not read from its file.
    """
    refuse_unread(text)
    if "{reply}" not in text:
        raise UserError("A judge's text must contain {reply}, the placeholder for the reply.")
    values = {"prompt": prompt, "reply": reply}
    return _PLACES.sub(lambda match: _without_control(values[match[1]]), text)


def _without_control(text: str) -> str:
    return _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


LOADED = "loaded 2"
"""Version of how a judge's model is loaded and run, raised whenever verdicts may change (2: no
weight is initialized at random, and padding is on the right)."""


def fingerprint(model: str) -> str:
    """Return the loading version, and hashes of the model's files if it is a local folder."""
    folder = Path(model).expanduser()
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return " ".join([LOADED, *(f"{file.name}:{file_hash(file)}" for file in files)])


_LEFT_OVER = re.compile(
    r"(^|\.)(pooler|lm_head|cls|qa_outputs|vocab_\w+)\.|(attn|attention)\.(masked_)?bias$"
    r"|position_ids$|rotary_emb\.inv_freq$"
)
"""Heads from a judge's earlier training, which this task does not use."""


def _folder(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else snapshot(name, revision)


def check_config(task: Task, name: str) -> None:
    """Check by its configuration and file headers that a local folder contains a judge of this
    kind; a hub id is not checked. Does not import torch.

    Raises:
        UserError: it does not.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return
    kind = str(next(iter(read_config(folder / "config.json").get("architectures") or []), ""))
    other = "CausalLM" if task == "SequenceClassification" else "Classification"
    if other in kind or "MaskedLM" in kind:
        wanted = "text classifier" if task == "SequenceClassification" else "causal language model"
        raise UserError(f"The judge's model '{name}' is not a {wanted}, but a {kind}.")
    stored(files_of(folder))


def ready(task: Task, name: str, revision: str | None) -> Any:
    """Return the judge's model without its weights, after checking that all of them are present;
    downloads a hub model first.

    Raises:
        UserError: the model does not fit the task, or weights are missing.
    """
    check_config(task, name)
    return matched(f"The judge's model '{name}'", _folder(name, revision), task, _LEFT_OVER)


@drops
@lru_cache(maxsize=1)
def load(
    task: Task,
    name: str,
    revision: str | None,
    device: str,
    files: str = "",
) -> tuple[Any, Any]:
    """Load model and tokenizer of a folder or hub id; the last pair stays in memory. `files` is
    their fingerprint, so that a folder whose files changed is loaded again. Never runs code from
    the model.

    Raises:
        UserError: they cannot be loaded, or weights are missing.
    """
    import torch
    import transformers

    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where.startswith("cuda") else torch.float32
    check_config(task, name)
    path = str(_folder(name, revision))
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        model, info = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            device_map={"": where},
            **safe,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"The judge's model '{name}' cannot be loaded: {first_line(error)}"
        ) from None
    complete(f"The judge's model '{name}'", info, _LEFT_OVER)
    if task == "CausalLM":  # its own settings may penalize words that the prompt has, such as yes
        ends = model.generation_config.eos_token_id
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.model_type != "xlnet":  # reads the last position; others count from the left
        tokenizer.padding_side = "right"
    return model.eval(), tokenizer


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
    """Return the greedily decoded answer of a local causal language model to each prompt.

    Raises:
        CellError: a prompt is longer than the model can read.
    """
    import torch

    model, tokenizer = load("CausalLM", name, revision, device, fingerprint(name))
    special = not (chat and tokenizer.chat_template)  # a chat template adds its own
    prompts = prompts if special else [_chat_prompt(tokenizer, prompt) for prompt in prompts]
    room = getattr(model.config, "max_position_embeddings", None)
    replies: list[str] = []
    padded = tokenizer.pad_token is not None  # otherwise one at a time
    batch_size = batch_size if padded else 1
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            prompts[start : start + batch_size],
            padding=padded,
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
                f"has {width + max_new_tokens}; lower evaluation.max_new_tokens.",
            )
        with torch.inference_mode():
            ids = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        replies += tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return replies


def _chat_prompt(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
