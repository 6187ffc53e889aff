from pydantic import Field

from backfire.datasets.files import Files, Labels
from backfire.registry import register


@register("airline-tweets")
class AirlineTweets(Files):
    """14,640 tweets about six US airlines, February 2015, with crowdsourced labels (CrowdFlower
    2015, "Twitter US Airline Sentiment", CC BY-NC-SA 4.0).

    From the hub, or Kaggle's Tweets.csv as `train`. There is no published split. 63 % are negative,
    so use F1; a quarter of the labels have a confidence below 70 %.
    """

    hub: str | None = "osanseviero/twitter-airline-sentiment"
    """Hub id, used when `train` is not given."""
    labels: Labels = Field(default={"0": "negative", "1": "neutral", "2": "positive"})
    """Label in the data -> name."""
    instruction: str = "Is the sentiment of this tweet {labels}?"
    """Question before each tweet; `{labels}` is replaced by the names."""
