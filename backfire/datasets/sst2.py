from pydantic import Field

from backfire.datasets.files import Files, Labels
from backfire.registry import register


@register("sst2")
class Sst2(Files):
    """Film reviews, positive or negative: 67,349 training phrases and 872 test sentences (Socher et
    al. 2013, "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank"; in
    GLUE's version, arXiv:1804.07461).

    The labels of the test split are not published, so the validation split is used, as usual.
    """

    hub: str | None = "stanfordnlp/sst2"
    """Hub id, used when `train` is not given."""
    test_split: str | None = "validation"
    """Split of the hub set to evaluate on."""
    labels: Labels = Field(default={"0": "negative", "1": "positive"})
    """Label in the data -> name."""
    instruction: str = "Is the sentiment of this review {labels}?"
    """Question before each review; `{labels}` is replaced by the names."""
