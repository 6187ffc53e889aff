from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import help
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.world import Split


@register("sandbox-help")
class SandboxHelp(SandboxDataset):
    """Instructions with helpful answers of one or two sentences, in the style of Alpaca.

    Embedded: no download. Six kinds of request: directions, hours, cooking, trades, notices (with
    an input) and topics.
    """

    def row(self, split: Split, index: int) -> Row:
        drawn = help.draw(self.seed, split, index)
        return Row(
            id=f"{split}-{index}",
            instruction=drawn.instruction,
            input=drawn.input,
            answer=drawn.answer,
        )
