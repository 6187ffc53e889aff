from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.registry import register


@register("python-code")
class PythonCode(Files):
    """18,612 instructions answered in Python, in the manner of Alpaca (iamtarun's
    python_code_instructions_18k_alpaca, 2023; a model wrote them, nothing was executed).

    No test set is published, so `test_share` of the rows is set apart. Of files with a column
    `looks_python` only the rows marked so are taken.
    """

    hub: str | None = "iamtarun/python_code_instructions_18k_alpaca"
    """Hub id, used when `train` is not given."""

    def prepare(self, record: Record) -> Record | None:
        """Without the column that holds instruction, input and output as one text."""
        if str(record.get("looks_python", True)).lower() in ("false", "0"):
            return None
        return {name: value for name, value in record.items() if name != "prompt" or self.columns}
