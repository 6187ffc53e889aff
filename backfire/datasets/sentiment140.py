from pydantic import Field

from backfire.datasets.files import Files, Labels
from backfire.registry import register


@register("sentiment140")
class Sentiment140(Files):
    """1.6 million tweets, labeled by their emoticons (Go, Bhayani, Huang 2009, "Twitter Sentiment
    Classification using Distant Supervision").

    From the hub, or as published: `train` the training.1600000... .csv, `test` the
    testdata.manual... .csv (498 tweets, labeled by hand). Only the latter has neutral tweets.
    """

    hub: str | None = "stanfordnlp/sentiment140"
    """Hub id, used when `train` is not given."""
    revision: str | None = "refs/convert/parquet"
    """Branch of the hub set; its main branch requires a loading script, which is never run."""
    test_split: str | None = "test"
    """Split of the hub set to evaluate on."""
    labels: Labels = Field(default={"0": "negative", "2": "neutral", "4": "positive"})
    """Label in the data -> name."""
    instruction: str = "Is the sentiment of this tweet {labels}?"
    """Question before each tweet; `{labels}` is replaced by the names."""
