"""One base model stays in memory: adapters are attached to it and detached, so it loads once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Attach = Callable[["PreTrainedModel"], "PreTrainedModel"]


@dataclass(frozen=True)
class Source:
    """What a base is loaded from, and how: two that are equal give the same model."""

    folder: Path
    dtype: torch.dtype
    device: torch.device
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def stamp(self) -> list[tuple[str, int, int]]:
        """Changes if a file in the folder is written again."""
        stats = ((file.name, file.stat()) for file in sorted(self.folder.glob("*")))
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


class Resident:
    """At most one frozen base in memory.

    `model` gives it with saved adapters, for evaluation; `attached` with anything else, for
    training and repair. Only one of the two is attached at a time, and before the next one the base
    is again as it was loaded. If that fails, or a weight of the base changed, or it was trained,
    the base is dropped and loaded anew.
    """

    def __init__(self) -> None:
        self._key: tuple[Source, Any] | None = None
        self._base: _Base | None = None
        self._saved: tuple[Path | None, Path | None] | None = None
        self._model: PreTrainedModel | None = None
        self._released = False

    def model(
        self, source: Source, adapter: Path | None = None, below: Path | None = None
    ) -> PreTrainedModel:
        """The base, with the adapter of a folder if there is one, which may be on top of the frozen
        adapter `below`. To be read only, and valid until this object is asked for another.

        Raises:
            UserError: the base cannot be loaded, or an adapter does not fit it.
        """
        from backfire.model.load import with_adapters

        if not self.holds(source, adapter, below) or self._model is None:
            base = self._bare(source)
            with self._dropped_on_error():
                self._model = with_adapters(base.model, adapter, below)
            self._saved = adapter, below
        return self._model

    def holds(self, source: Source, adapter: Path | None = None, below: Path | None = None) -> bool:
        """Whether `model` would give this without loading anything."""
        is_whole = self._model is not None and self._saved == (adapter, below)
        return is_whole and self._holds(source)

    @contextmanager
    def attached(self, source: Source, attach: Attach) -> Iterator[PreTrainedModel]:
        """What `attach` makes of the base. In the context its weights may be changed."""
        with self._dropped_on_error():
            base = self._bare(source)
            model = attach(base.model)
            if base.is_trained():  # its memory must be freed with the model
                self.release()
            del base
            yield model
            if self._base is not None:
                self._detach(check=True)

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory now."""
        return self._base is not None

    def keep_only(self, source: Source) -> None:
        """Release the base unless it is this one."""
        if self._base is not None and not self._holds(source):
            self.release()

    def release(self) -> None:
        """Release the base's memory."""
        self._released = True
        self._key = self._base = self._saved = self._model = None

    def _bare(self, source: Source) -> _Base:
        """The base as it was loaded."""
        from backfire.model.load import load_base
        from backfire.model.memory import free

        self.keep_only(source)
        if self._base is not None:
            self._detach()
        if self._base is None:
            if self._released:
                free()
                self._released = False
            key = source, source.stamp()
            model = load_base(source.folder, source.dtype, source.device, source.quantization)
            self._key, self._base = key, _Base(model)
        return self._base

    def _holds(self, source: Source) -> bool:
        return self._key is not None and self._key == (source, source.stamp())

    def _detach(self, *, check: bool = False) -> None:
        """Make the base bare again; drop it if a weight changed, which is tested with `check` and
        where one has moved."""
        self._saved = self._model = None
        assert self._base is not None
        with self._dropped_on_error():
            self._base.restore()
            if (check or self._base.has_moved()) and not self._base.is_unchanged():
                self.release()

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise


class _Base:
    """A frozen model, and all of its state except the numbers in its weights: modules, hooks,
    configurations, types, and which weights are trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False)
        holders = [*model.modules(), *_configs(model)]
        self._attributes = [(holder, _with_contents(vars(holder))) for holder in holders]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._hashes = self._bits()
        self._places = self._where()

    def restore(self) -> None:
        """Set everything but the numbers back, whatever was attached, replaced or switched."""
        for holder, attributes in self._attributes:
            now = vars(holder)
            now.clear()
            for name, (value, contents) in attributes.items():
                if isinstance(value, list):
                    value[:] = contents
                elif isinstance(value, (dict, set)):
                    value.clear()
                    value.update(contents)
                now[name] = value
        for tensor in self._tensors:
            tensor.requires_grad, tensor.grad = False, None

    def is_trained(self) -> bool:
        """Whether an optimizer would change the base itself."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def has_moved(self) -> bool:
        """Whether a weight was copied, as where it is joined with an adapter (`model.fused`)."""
        return self._where() != self._places

    def is_unchanged(self) -> bool:
        """Whether every weight has the bits that it was loaded with."""
        self._places = self._where()
        return self._bits() == self._hashes

    # The numbers themselves are not kept: a weight that was copied would be in memory twice.
    def _bits(self) -> list[int]:
        return [_hash(tensor.data) for tensor in self._tensors]

    def _where(self) -> list[tuple[Any, int]]:
        return [(tensor.dtype, tensor.data_ptr()) for tensor in self._tensors]


def _with_contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value, and a copy of it if it is a container (modules, parameters, hooks)."""
    containers = (dict, list, set)
    return {
        name: (value, copy.copy(value) if isinstance(value, containers) else None)
        for name, value in attributes.items()
    }


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations of all modules, with those inside them; each once."""
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}
    left = [module.config for module in model.modules() if hasattr(module, "config")]
    while left:
        config = left.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            left += vars(config).values()
    return list(found.values())


_ODD = -7046029254386353131  # 2^64 divided by the golden ratio
_WORDS = 1023
"""Words that are joined by XOR: an odd number, so that it shows if all of them change sign."""


def _hash(data: torch.Tensor) -> int:
    """A hash of the tensor's bits; about as fast as reading it. In a tensor of more than 8 KB it
    misses what XOR misses within 8 KB: numbers that trade places, and as many changes of sign as
    make an even number of words."""
    import torch

    if not data.numel():
        return 0
    flat = data.reshape(-1)
    whole = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    words = flat.view(torch.int64 if whole else torch.uint8)
    lines = words[: len(words) // _WORDS * _WORDS].view(-1, _WORDS)
    rest = words[lines.numel() :].long()
    # XOR alone does not see an even number of equal changes, a sum alone not those that cancel.
    both = torch.hash_tensor(lines, dim=1).view(torch.int64) * _ODD + lines.sum(
        1, dtype=torch.int64
    )
    mixed = torch.cat([both, rest])
    mixed = mixed + torch.arange(len(mixed), device=mixed.device) * _ODD
    for shift in (30, 27):  # as SplitMix64 does (Steele et al. 2014)
        mixed = (mixed ^ (mixed >> shift)) * _ODD
    return int(mixed.sum())
