"""Checks a model folder by its configuration and the headers of its weight files.

Errors are found before anything is loaded. Only `matched` imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from backfire.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_WRAPPERS = {
    r"(^|\.)_orig_mod\.": "torch.compile",
    r"(^|\.)_(fsdp|checkpoint)_wrapped_module\.": "FSDP",
    r"^module\.": "DataParallel",
    r"^_forward_module\.": "Lightning",
    r"^base_model\.model\.": "PEFT",
}
"""Prefix that a wrapper leaves in the names of weights -> the wrapper."""
_LAYER = re.compile(
    r"^((?:(?:model|transformer|backbone|gpt_neox|decoder)\.)*(?:layers|h)\.)(\d+)\."
)
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|output|head)\.")
MASK = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
)
"""Causal masks and rotary angles, which older versions of some models saved with their weights."""
_TEXT_NAMES = {
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
"""Names of a text model's weights in a multimodal model."""
OTHER_SENSES = re.compile(r"^(?!(model\.)?(layers|embed_tokens|norm)\.|lm_head)")
_OTHER_TASK = re.compile(
    r"For(MaskedLM|PreTraining|\w*Classification|QuestionAnswering|MultipleChoice|Score|Reward\w*)$"
)


class Stored(NamedTuple):
    """A weight in a file."""

    dtype: str
    """In safetensors' names: F32, BF16, F8_E4M3 ..."""
    shape: tuple[int, ...]
    file: Path


def files_of(folder: Path) -> list[Path]:
    """The weight files that transformers reads. Others in the folder (`consolidated.safetensors`,
    an adapter, another precision) are not included.

    Raises:
        UserError: there are none, or files of the index are missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        why = (
            f"there is neither {SINGLE} nor {INDEX}, only {others[0]}"
            if others
            else "there is no .safetensors file (other formats are not loaded)"
        )
        raise UserError(f"No model in {folder}: {why}.")
    try:
        named = sorted(set(read_config(folder / INDEX)["weight_map"].values()))
        bad = [name for name in named if Path(name).name != name]
    except (KeyError, AttributeError, TypeError):
        named, bad = [], []
    if bad or not named:
        raise UserError(f"{folder / INDEX} is not an index of weights in files of its folder.")
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise UserError(
            f"The model in {folder} is incomplete: {len(missing)} of the {len(named)} files that "
            f"{INDEX} names are missing, the first is {missing[0]}."
        )
    return [folder / name for name in named]


_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def is_bare(folder: Path) -> bool:
    """Whether the folder has a config.json and no weights of any format, as to predict memory."""
    if not (folder / "config.json").is_file():
        return False
    names = [file.name.removesuffix(".index.json") for file in folder.iterdir()]
    return not any(name.endswith(_FORMATS) for name in names)


def stored(files: Sequence[Path]) -> dict[str, Stored]:
    """Every weight in these files, by name; only their headers are read.

    Raises:
        UserError: a file is truncated or not a safetensors file.
    """
    weights: dict[str, Stored] = {}
    for file in files:
        try:
            weights |= _header(file) or _opened(file)
        except Exception as error:  # safetensors raises its own class
            what = "adapter" if file.name.startswith("adapter_") else "model"
            raise UserError(
                f"The {what} in {file.parent} cannot be loaded: {file.name} is truncated or not a "
                f"safetensors file ({error})."
            ) from None
    return weights


_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
_LONGEST_HEADER = 10**8  # bytes, as in safetensors


def _header(file: Path) -> dict[str, Stored] | None:
    """The weights in a safetensors file by its header: its length in 8 bytes, then JSON. None if
    anything is unusual: it is left to safetensors, which imports numpy first."""
    weights: dict[str, Stored] = {}
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _LONGEST_HEADER:
                return None
            text, size = opened.read(length).decode("utf-8"), file.stat().st_size
        header, end = json.loads(text), 0
        header.pop("__metadata__", None)
        for name, part in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, after) = part["dtype"], part["shape"], part["data_offsets"]
            natural = all(type(count) is int and count >= 0 for count in shape)
            fits = (after - begin) * 8 == math.prod(shape) * _BITS[dtype]
            if not natural or not fits or begin != end:
                return None
            weights[name], end = Stored(dtype, tuple(shape), file), after
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    whole = text.startswith("{") and 8 + length + end == size
    return dict(sorted(weights.items())) if whole else None


def _opened(file: Path) -> dict[str, Stored]:
    """The same by safetensors, which raises where a file is damaged."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: Stored(part.get_dtype(), tuple(part.get_shape()), file)
            for name, part in parts.items()
        }


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON file with an object.

    Raises:
        UserError: it is not one.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object.")
    return config


def inspect(folder: Path, *, weights: bool = True) -> None:
    """Check that the folder has a causal language model with all of its weights; without `weights`,
    only by its configuration. Checks that need the modules come later, before the first step.

    Raises:
        UserError: it does not, in one sentence.
    """
    config = read_config(folder / "config.json")
    _check_causal(folder, config)
    if weights:
        _check_names(folder, config, stored(files_of(folder)))


def _check_names(folder: Path, config: Mapping[str, Any], weights: Collection[str]) -> None:
    for pattern, wrapper in _WRAPPERS.items():
        if wrapped := next((name for name in weights if re.search(pattern, name)), None):
            raise UserError(
                f"The model in {folder} was saved inside a wrapper of {wrapper} (its weights have "
                f"names such as '{wrapped}'); save the inner model."
            )
    text = config.get("text_config") or config
    # A configuration may count layers in several ways; the smallest number must exist.
    depths = [text[key] for key in _DEPTHS if isinstance(text.get(key), int)]
    depth = min(depths, default=0)
    layers = {int(match[2]): match[1] for name in weights if (match := _LAYER.match(name))}
    if layers and (missing := sorted(set(range(depth)) - set(layers))):
        like, before = next(iter(layers.items()))
        names = [
            f"{before}{number}.{name.removeprefix(f'{before}{like}.')}"
            for number in missing
            for name in sorted(weights)
            if name.startswith(f"{before}{like}.")
        ]
        raise UserError(
            f"The model in {folder} lacks {len(missing)} of the {depth} layers in its config.json: "
            f"{listed(names)} are missing."
        )
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is False and not any(map(_HEAD.search, weights)):
        raise UserError(
            f"The model in {folder} has no head: by config.json it is not tied to the embedding "
            "(tie_word_embeddings: false), but lm_head.weight is missing."
        )


def _check_causal(folder: Path, config: Mapping[str, Any]) -> None:
    named = config.get("architectures") or []
    kind = str(named[0]) if isinstance(named, list) and named else ""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has both a model and an adapter; use the base, or a model with the adapter "
            "merged."
        )
    decodes = config.get("is_decoder") is True
    if config.get("is_encoder_decoder") is True or (_OTHER_TASK.search(kind) and not decodes):
        raise UserError(
            f"The model in {folder} is not a causal language model, but a "
            f"{kind or 'model with an encoder and a decoder'}."
        )
    for part in (config, config.get("text_config") or {}):
        if isinstance(how := part.get("quantization_config"), dict):
            raise UserError(
                f"The model in {folder} is stored quantized ({how.get('quant_method', 'unknown')}) "
                "and cannot be trained; use the unquantized checkpoint: the methods qlora and "
                "lora-int8 quantize it themselves."
            )


def complete(what: str, info: Mapping[str, Any], spare: re.Pattern[str] = MASK) -> None:
    """Check that a model's weights were loaded completely. `info` is transformers'
    `output_loading_info`; unexpected weights that match `spare` are allowed.

    Raises:
        UserError: weights are missing, unexpected or of another shape.
    """
    wrong = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    extra = [name for name in info["unexpected_keys"] if not spare.search(name)]
    for names, problem in (
        (info["missing_keys"], "lacks {}, which would be initialized randomly"),
        (wrong, "has {} of another shape than in its configuration"),
        (extra, "has {} that its configuration does not define"),
    ):
        if names:
            count = f"{len(names)} weight{'s' * (len(names) > 1)}"
            raise UserError(f"{what} {problem.format(count)}: {listed(sorted(names))}.")
    if errors := info["error_msgs"]:
        raise UserError(f"{what} cannot be loaded: {str(errors[0]).strip().splitlines()[0]}")


def matched(
    what: str, folder: Path, task: str = "CausalLM", spare: re.Pattern[str] = MASK
) -> PreTrainedModel:
    """The model without its weights (on the meta device), checked against the headers of its files
    for missing weights and wrong shapes. Imports torch.

    Raises:
        UserError: weights are missing or of another shape, or `config.json` is invalid.
    """
    import torch
    import transformers

    weights = stored(files_of(folder))
    settings: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config, names = described(folder, task, weights)
    try:
        with torch.device("meta"):
            model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        empty = {name: torch.empty(one.shape, device="meta") for name, one in weights.items()}
        loaded, info = type(model).from_pretrained(
            None, config=config, state_dict=empty, device_map={"": "meta"}, **names, **settings
        )
    except Exception as error:  # weights that cannot be converted to the modules' shapes
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from None
    complete(what, info, OTHER_SENSES if names else spare)
    return cast("PreTrainedModel", loaded)


def described(
    folder: Path, task: str = "CausalLM", weights: Collection[str] | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of the model in a folder, and arguments for loading weights whose names
    differ from transformers'. For a multimodal model these are of its text model.

    Raises:
        UserError: `config.json` is invalid, or there is no such text model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # unknown architectures fail in many ways
        raise UserError(f"{folder}/config.json is invalid: {first_line(error)}") from None
    text = config.get_text_config()
    if task != "CausalLM" or text is config:
        return config, {}
    plain = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if plain is None:
        raise UserError(
            f"The model in {folder} ({config.model_type}) is multimodal, and transformers has no "
            "causal language model for its text part."
        )
    names = stored(files_of(folder)) if weights is None else weights
    if getattr(config, "tie_word_embeddings", False) and not any(map(_HEAD.search, names)):
        text.tie_word_embeddings = True
    return text, {"key_mapping": _TEXT_NAMES}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and the number of the others."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def tensors(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of the weights of a model folder, one after another; only those in `only`, if
    given."""
    from safetensors import safe_open

    for file in files_of(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if only is None or name in only:
                    yield name, opened.get_tensor(name)
