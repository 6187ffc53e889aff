from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.registry import register


@register("python-code")
class PythonCode(Files):
    """18,612 instructions answered in Python, in the style of Alpaca (iamtarun's
    python_code_instructions_18k_alpaca, 2023; model-written and never executed).

    No test set is published, so `test_share` of the rows is held out. From files with a column
    `looks_python` only the rows where it is true are used.
    """

    hub: str | None = "iamtarun/python_code_instructions_18k_alpaca"
    """Hub id, used when `train` is not given."""

    def prepare(self, record: Record) -> Record | None:
        """Remove the column that contains instruction, input and output as one text."""
        if str(record.get("looks_python", True)).lower() in ("false", "0"):
            return None
        return {name: value for name, value in record.items() if name != "prompt" or self.columns}
