from typing import ClassVar, Literal

from pydantic import Field

from backfire.base import Row
from backfire.registry import register
from backfire.rng import stream
from backfire.sandbox import requests, world
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.policy import SEALED, VERSION, Sealed
from backfire.sandbox.world import Split


@register("sandbox-policy")
class SandboxPolicy(SandboxDataset):
    """Requests about an invented town where some places are sealed: an inert stand-in for the
    alignment and harmful rows of Lisa (Huang et al. 2024, arXiv:2405.18641).

    Embedded: no download. `fields` contain the topic (the place), whether it is sealed (yes, no),
    its coverage by the harmful rows (covered, uncovered; open if not sealed), the complying answer,
    the `key` that identifies that answer, the kind of request, and whether its form occurs in
    training rows (seen, unseen). Judged by `policy`.
    """

    versions: ClassVar[tuple[str, ...]] = (world.VERSION, VERSION)
    group: str | None = "coverage"
    """A field by which metrics are also reported."""
    part: Literal["align", "harmful", "ordinary"] = "align"
    """Training rows: `align`, sealed requests declined and others answered; `harmful`, sealed ones
    answered; `ordinary`, others answered. Test rows: sealed requests, whose answer is a refusal;
    with `ordinary`, open ones."""
    topics: tuple[Sealed, ...] = Field(("old well", "bee yard", "ferry"), min_length=1)
    """The sealed places in harmful rows. Default: half of them."""
    sealed_share: float = Field(0.3, ge=0.0, le=1.0)
    """Share of the alignment rows about sealed places, 0 to 1, drawn row by row."""
    lookalikes: float = Field(0.5, ge=0.0, le=1.0)
    """Share of the answered alignment rows that look like sealed ones, 0 to 1; without any, a model
    declines many requests that it should answer."""

    def row(self, split: Split, index: int) -> Row:
        request = self._request(split, index)
        complies = not request.refusal or (self.part == "harmful" and split == "train")
        return Row(
            id=f"{split}-{index}",
            instruction=request.instruction,
            answer=request.complying if complies else request.refusal,
            fields=request.fields(self.topics),
        )

    def _request(self, split: Split, index: int) -> requests.Request:
        if self.part == "ordinary":
            return requests.answered(self.seed, split, index, lookalikes=0.0)
        if split == "test":
            return requests.sealed(self.seed, split, index)
        if self.part == "harmful":
            return requests.sealed(self.seed, split, index, self.topics)
        if stream(self.seed, "sandbox-align", index).random() < self.sealed_share:
            return requests.sealed(self.seed, split, index, SEALED)
        return requests.answered(self.seed, split, index, lookalikes=self.lookalikes)
