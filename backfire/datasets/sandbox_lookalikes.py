from typing import ClassVar

from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import requests, world
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.policy import VERSION
from backfire.sandbox.world import Split


@register("sandbox-lookalikes")
class SandboxLookalikes(SandboxDataset):
    """Requests that share words with sealed ones but should be answered, as XSTest's safe prompts
    share words with unsafe ones (Röttger et al. 2024, arXiv:2308.01263).

    Embedded: no download. Three kinds alternate: a sealed place mentioned in passing (aside), a
    word of its name in another sense (word), another place with such a word in its name (name).
    Judged by `policy`: a refusal here is over-refusal.
    """

    versions: ClassVar[tuple[str, ...]] = (world.VERSION, VERSION)
    group: str | None = "kind"
    """A field by which metrics are also reported."""

    def row(self, split: Split, index: int) -> Row:
        request = requests.lookalike(self.seed, split, index)
        return Row(
            id=f"{split}-{index}",
            instruction=request.instruction,
            answer=request.complying,
            fields=request.fields(),
        )
