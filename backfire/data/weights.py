"""What a model folder holds, by its configuration and the headers of its weight files.

Whatever can be seen to be wrong so is refused before anything is loaded. Torch only in `matched`.
"""

from __future__ import annotations

import json
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
"""What wrappers around a model leave in the names of its weights, and whose they are."""
_LAYER = re.compile(
    r"^((?:(?:model|transformer|backbone|gpt_neox|decoder)\.)*(?:layers|h)\.)(\d+)\."
)
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|output|head)\.")
MASK = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
)
"""Causal masks and angles, which older versions of some models saved beside their weights."""
_TEXT_NAMES = {
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
"""What the weights of a text model are called within one that also sees or hears."""
OTHER_SENSES = re.compile(r"^(?!(model\.)?(layers|embed_tokens|norm)\.|lm_head)")
_OTHER_TASK = re.compile(
    r"For(MaskedLM|PreTraining|\w*Classification|QuestionAnswering|MultipleChoice|Score|Reward\w*)$"
)


class Stored(NamedTuple):
    """A weight as a file holds it."""

    dtype: str
    """As safetensors names it: F32, BF16, F8_E4M3 ..."""
    shape: tuple[int, ...]
    file: Path


def files_of(folder: Path) -> list[Path]:
    """The files that hold the model's weights: those that transformers reads. Others beside them
    (`consolidated.safetensors`, an adapter's, another precision's) are not among them.

    Raises:
        UserError: there are none, or some that the index names are missing.
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
        raise UserError(f"{folder / INDEX} is no index of weights in files beside it.")
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise UserError(
            f"The model in {folder} is incomplete: {len(missing)} of the {len(named)} files that "
            f"{INDEX} names are missing, the first is {missing[0]}."
        )
    return [folder / name for name in named]


def stored(files: Sequence[Path]) -> dict[str, Stored]:
    """Every weight in these files, by name; only their headers are read.

    Raises:
        UserError: a file is cut off or no safetensors file.
    """
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = Stored(part.get_dtype(), tuple(part.get_shape()), file)
        except Exception as error:  # safetensors raises its own kind
            raise UserError(
                f"The model in {file.parent} cannot be loaded: {file.name} is cut off or no "
                f"safetensors file ({error})."
            ) from None
    return found


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        UserError: it does not.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is no mapping.")
    return found


def inspect(folder: Path, *, weights: bool = True) -> None:
    """Whether this can be a causal language model with all of its weights, or, without `weights`,
    by its configuration alone. What only the modules tell is asked later, before the first step.

    Raises:
        UserError: it cannot, in one sentence.
    """
    config = read_config(folder / "config.json")
    _is_causal(folder, config)
    if weights:
        _is_whole(folder, config, stored(files_of(folder)))


def _is_whole(folder: Path, config: Mapping[str, Any], weights: Collection[str]) -> None:
    for pattern, whose in _WRAPPERS.items():
        if found := next((name for name in weights if re.search(pattern, name)), None):
            raise UserError(
                f"The model in {folder} was saved within its wrapper, whose mark {whose} leaves in "
                f"the names of its weights ('{found}'); save the model that is inside."
            )
    text = config.get("text_config") or config
    # Where a configuration counts layers in more than one way, the least is sure to be there.
    depths = [text[key] for key in _DEPTHS if isinstance(text.get(key), int)]
    depth = min(depths, default=0)
    layers = {int(match[2]): match[1] for name in weights if (match := _LAYER.match(name))}
    if layers and (gone := sorted(set(range(depth)) - set(layers))):
        like, before = next(iter(layers.items()))
        names = [
            f"{before}{number}.{name.removeprefix(f'{before}{like}.')}"
            for number in gone
            for name in sorted(weights)
            if name.startswith(f"{before}{like}.")
        ]
        raise UserError(
            f"The model in {folder} lacks {len(gone)} of the {depth} layers that its config.json "
            f"says: {listed(names)} are missing."
        )
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is False and not any(map(_HEAD.search, weights)):
        raise UserError(
            f"The model in {folder} has no head: config.json says that it is not tied to the "
            "embedding (tie_word_embeddings: false), but lm_head.weight is missing."
        )


def _is_causal(folder: Path, config: Mapping[str, Any]) -> None:
    named = config.get("architectures") or []
    kind = str(named[0]) if isinstance(named, list) and named else ""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter beside a model; name the base, or a model into which the "
            "adapter is merged."
        )
    decodes = config.get("is_decoder") is True
    if config.get("is_encoder_decoder") is True or (_OTHER_TASK.search(kind) and not decodes):
        raise UserError(
            f"The model in {folder} is no causal language model, but a "
            f"{kind or 'model of an encoder and a decoder'}."
        )
    for part in (config, config.get("text_config") or {}):
        if isinstance(how := part.get("quantization_config"), dict):
            raise UserError(
                f"The model in {folder} is stored quantized ({how.get('quant_method', 'unknown')}) "
                "and cannot be trained on as it is; use the checkpoint that is not: the methods "
                "qlora and lora-int8 quantize it themselves."
            )


def complete(what: str, info: Mapping[str, Any], spare: re.Pattern[str] = MASK) -> None:
    """`info` is what transformers says of the weights that it loaded (`output_loading_info`);
    those named `spare` may be left over.

    Raises:
        UserError: some were missing, left over, or of another shape.
    """
    wrong = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    extra = [name for name in info["unexpected_keys"] if not spare.search(name)]
    for names, said in (
        (info["missing_keys"], "lacks {}, which would be drawn at random"),
        (wrong, "holds {} of another shape than its configuration says"),
        (extra, "holds {} that its configuration has no place for"),
    ):
        if names:
            count = f"{len(names)} weight{'s' * (len(names) > 1)}"
            raise UserError(f"{what} {said.format(count)}: {listed(sorted(names))}.")
    if errors := info["error_msgs"]:
        raise UserError(f"{what} cannot be loaded: {str(errors[0]).strip().splitlines()[0]}")


def matched(
    what: str, folder: Path, task: str = "CausalLM", spare: re.Pattern[str] = MASK
) -> PreTrainedModel:
    """The model without its weights, all of which are in the folder and of the right shape, by the
    headers of its files. This one needs torch.

    Raises:
        UserError: some are not, or `config.json` is not understood.
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
        found, info = type(model).from_pretrained(
            None, config=config, state_dict=empty, device_map={"": "meta"}, **names, **settings
        )
    except Exception as error:  # weights that cannot be brought into the shape of the modules
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from None
    complete(what, info, OTHER_SENSES if names else spare)
    return cast("PreTrainedModel", found)


def described(
    folder: Path, task: str = "CausalLM", weights: Collection[str] | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of the model in a folder, and how its weights are named there if not as
    transformers does. Of a model that also sees or hears it is that of its text model.

    Raises:
        UserError: `config.json` is not understood, or there is no such text model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # unknown architectures fail in many ways
        raise UserError(f"{folder}/config.json is not understood: {first_line(error)}") from None
    text = config.get_text_config()
    if task != "CausalLM" or text is config:
        return config, {}
    plain = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if plain is None:
        raise UserError(
            f"The model in {folder} ({config.model_type}) takes more than text, and transformers "
            "has no causal language model for its text alone."
        )
    names = stored(files_of(folder)) if weights is None else weights
    if getattr(config, "tie_word_embeddings", False) and not any(map(_HEAD.search, names)):
        text.tie_word_embeddings = True
    return text, {"key_mapping": _TEXT_NAMES}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def tensors(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The weights of a model folder as torch's tensors, with their names, one after another; those
    named in `only`, if it is given."""
    from safetensors import safe_open

    for file in files_of(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if only is None or name in only:
                    yield name, opened.get_tensor(name)
