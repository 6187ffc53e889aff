from pydantic import Field

from backfire.datasets.files import Files, Labels
from backfire.registry import register


@register("multilingual-sentiment")
class MultilingualSentiment(Files):
    """Three-way sentiment in twelve languages, merged from many published sets
    (github.com/tyqiangz/multilingual-sentiment-datasets); used by the multilingual QLoRA study.

    The sources use different labeling rules (stars, emotions, tweets). The English rows are
    TweetEval tweets: do not train on one of the two and test on the other.
    """

    hub: str | None = "tyqiangz/multilingual-sentiments"
    """Hub id, used when `train` is not given."""
    hub_config: str | None = "all"
    """A language, such as `german`, or `all`."""
    revision: str | None = "refs/convert/parquet"
    """Branch of the hub set; its main branch requires a loading script, which is never run."""
    test_split: str | None = "test"
    """Split of the hub set to evaluate on."""
    group: str | None = "language"
    """A field by which metrics are also reported."""
    labels: Labels = Field(default={"2": "negative", "1": "neutral", "0": "positive"})
    """Label in the data -> name."""
    instruction: str = "Is the sentiment of this text {labels}?"
    """Question before each text; `{labels}` is replaced by the names."""
