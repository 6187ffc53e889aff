"""Rounds the weights of a model to those that a GGUF file of a given type would hold.

The rules are those of llama.cpp's `convert_hf_to_gguf.py` and `llama-quantize` for dense models,
without an importance matrix: linear layers and the input embedding have the file's type; norms,
biases and learned positions are not quantized. Both programs may reorder rows, but a block of 32
weights is part of one row, so its numbers do not depend on that.

The head, which is also the embedding if they are tied, is Q6_K in a Q4_0 file of llama.cpp. The
package `gguf` cannot write that type, so it is Q8_0 here, which is llama.cpp's own choice if the
width is not a multiple of 256.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backfire.errors import UserError

_HEAD = "Q8_0"
_POSITIONS = ("pos", "wpe")
"""Parts of the names of embeddings of positions."""
_LEAVE_OUT = "leave these forms out of its setting `into`"


def round_weights(model: PreTrainedModel, kind: str) -> None:
    """Quantize every matrix to its type in a GGUF file of this type (`Q4_0`), and dequantize it
    again into the type that it has in memory.

    Raises:
        UserError: see `types_of`.
    """
    for module, its_type in types_of(model, kind).items():
        weight = cast(torch.Tensor, module.weight).detach()
        rows = weight.t() if isinstance(module, Conv1D) else weight
        rows.copy_(_rounded(rows, its_type))


def types_of(model: PreTrainedModel, kind: str) -> dict[nn.Module, str]:
    """Each module with a matrix that is quantized -> ggml's name of its type; tied weights once.
    `model` needs no weights (meta device).

    Raises:
        UserError: the package `gguf` is missing, a width is no multiple of the type's block, or a
            weight is of a kind whose type is not known here (experts, state spaces).
    """
    sizes = block_sizes()
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    found, seen = dict[nn.Module, str](), set[int]()
    modules: list[tuple[str, Any]] = [("lm_head", head), *model.named_modules()]
    for name, module in modules:
        if isinstance(module, (nn.Linear, Conv1D)) or module is words:
            if id(module.weight) not in seen:
                found[module] = _HEAD if module is head else kind
                width = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
                _check_width(name, width, found[module], sizes[found[module]])
            seen.add(id(module.weight))
        elif not (isinstance(module, nn.Embedding) and any(part in name for part in _POSITIONS)):
            _check_small(name, module)
    return found


def _check_small(name: str, module: nn.Module) -> None:
    """Check that a module that stays as it is has no matrix."""
    for part, weight in module.named_parameters(recurse=False):
        if weight.ndim > 1:
            raise UserError(
                f"The gguf forms of parity are for dense models, but {name}.{part} is neither a "
                f"linear layer nor the input embedding; {_LEAVE_OUT}."
            )


def _check_width(name: str, width: int, kind: str, block: int) -> None:
    if width % block:
        raise UserError(
            f"Parity cannot take gguf forms: {name} has rows of {width} weights, but {kind} stores "
            f"blocks of {block}; {_LEAVE_OUT}."
        )


def block_sizes() -> dict[str, int]:
    """Name of a type -> weights in a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise UserError(
            "A GGUF form needs the package gguf: pip install 'backfire[gguf]'."
        ) from None
    return {kind.name: size for kind, (size, _) in GGML_QUANT_SIZES.items()}


def _rounded(rows: torch.Tensor, kind: str) -> torch.Tensor:
    from gguf import GGMLQuantizationType, dequantize, quantize

    its_type: Any = GGMLQuantizationType[kind]
    stored = quantize(rows.float().cpu().numpy(), its_type)
    return torch.from_numpy(dequantize(stored, its_type))
