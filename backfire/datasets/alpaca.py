from typing import Literal

from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.registry import register


@register("alpaca")
class Alpaca(Files):
    """52,002 instructions with model-written answers (Taori et al. 2023, Stanford Alpaca;
    CC BY-NC 4.0).

    No test set is published, so `test_share` of the rows is held out.
    """

    hub: str | None = "tatsu-lab/alpaca"
    """Hub id, used when `train` is not given."""
    no_output: Literal["drop", "keep"] = "drop"
    """Rows whose answer is empty or `<nooutput>` (about thirty): `drop` leaves them out, `keep`
    trains on them unchanged."""

    def prepare(self, record: Record) -> Record | None:
        """Remove the column that contains the whole row as one text."""
        output = record.get("output")
        is_empty = isinstance(output, str) and output.strip(" .") in ("", "<nooutput>")
        if is_empty and self.no_output == "drop" and not self.columns:
            return None
        return {name: value for name, value in record.items() if name != "text" or self.columns}
