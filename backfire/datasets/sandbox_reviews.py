from pydantic import Field

from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import reviews
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.languages import LANGUAGES, Language
from backfire.sandbox.world import Split


@register("sandbox-reviews")
class SandboxReviews(SandboxDataset):
    """Three-way sentiment of generated reviews, in English and two invented languages.

    Embedded: no download. Evidence is mixed (negation, degrees, concessions) and some words of the
    test split never occur in the training split, so accuracy differs gradually between models.
    """

    group: str | None = "language"
    """A field by which metrics are also reported."""
    languages: tuple[Language, ...] = Field(LANGUAGES, min_length=1)
    """Languages to draw from, in equal parts: english, velin, tamoru."""
    noise: float = Field(0.03, ge=0.0, le=1.0)
    """Share of rows whose evidence lies between two labels, 0 to 1; they have either one, so no
    model can get about half of these rows right."""

    def row(self, split: Split, index: int) -> Row:
        text, label, language = reviews.draw(
            self.seed, split, index, languages=self.languages, noise=self.noise
        )
        return Row(
            id=f"{split}-{index}",
            instruction="Is this review negative, neutral or positive?",
            input=text,
            answer=label,
            label=label,
            candidates=reviews.LABELS,
            fields={"language": language},
        )
