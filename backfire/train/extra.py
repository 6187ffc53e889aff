"""The rows that defenses use in addition to the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backfire.base import Rendered
from backfire.data.render import Renderer

if TYPE_CHECKING:
    from backfire.train.finetune import Start


@dataclass(frozen=True)
class ExtraRows:
    """Rendered rows of the alignment stage, harmful ones, and clean ones of the task."""

    aligned: list[Rendered]
    harmful: list[Rendered]
    clean: list[Rendered]
    left_out: dict[str, int]
    """How many were too long, by part; without parts of which none was."""

    @classmethod
    def of(cls, start: Start, renderer: Renderer) -> ExtraRows:
        rows = {name: getattr(start, name) for name in ("aligned", "harmful", "clean")}
        found = {name: renderer.sift(part) for name, part in rows.items()}
        left = {name: len(long) for name, (_, long) in found.items() if long}
        return cls(**{name: items for name, (items, _) in found.items()}, left_out=left)
