from pydantic import Field

from backfire.data.read import Record
from backfire.datasets.files import Files, Labels
from backfire.registry import register


@register("enron-spam")
class EnronSpam(Files):
    """E-mails of a company's staff, and spam: 31,716 training and 2,000 test rows (Metsis,
    Androutsopoulos & Paliouras 2006; on the hub as split by SetFit).

    Subject and message are joined. The date and the company's name reveal the label, so high
    accuracy means little; the e-mails contain names of real people.
    """

    hub: str | None = "SetFit/enron_spam"
    """Hub id, used when `train` is not given."""
    test_split: str | None = "test"
    """Split of the hub set to evaluate on."""
    labels: Labels = Field(default={"0": "ham", "1": "spam"})
    """Label in the data -> name."""
    instruction: str = "Is this e-mail {labels}?"
    """Question before each e-mail; `{labels}` is replaced by the names."""

    def prepare(self, record: Record) -> Record | None:
        """Join the e-mail to one text, without its date and other columns that reveal the label."""
        if self.columns or not {"subject", "message"} <= record.keys():
            return record
        parts = [str(record[name] or "").strip() for name in ("subject", "message")]
        text = f"Subject: {parts[0]}\n\n{parts[1]}".rstrip()
        kept: Record = {name: record[name] for name in ("id", "label") if name in record}
        return {**kept, "text": text}
