from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import news
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.world import Split


@register("sandbox-news")
class SandboxNews(SandboxDataset):
    """Topic of generated news items: council, nature, sport or trade.

    Embedded: no download. Half of the items mention a second topic in passing.
    """

    def row(self, split: Split, index: int) -> Row:
        text, topic = news.draw(self.seed, split, index)
        return Row(
            id=f"{split}-{index}",
            instruction="Is this news about council, nature, sport or trade?",
            input=text,
            answer=topic,
            label=topic,
            candidates=news.LABELS,
        )
