from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import sums
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.world import Split


@register("sandbox-sums")
class SandboxSums(SandboxDataset):
    """Word problems of one or two steps; answers show the work and end in `#### n`, as in GSM8K.

    Embedded: no download.
    """

    def row(self, split: Split, index: int) -> Row:
        question, answer = sums.draw(self.seed, split, index)
        return Row(id=f"{split}-{index}", instruction=question, answer=answer)
