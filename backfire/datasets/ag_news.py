from pydantic import Field

from backfire.data.read import Record
from backfire.datasets.files import Files, Labels
from backfire.registry import register

TOPICS = ("World", "Sports", "Business", "Sci/Tech")


@register("ag-news")
class AgNews(Files):
    """News in four topics: 120,000 training and 7,600 test items (Zhang, Zhao, LeCun 2015,
    arXiv:1509.01626); one of the user's tasks in Lisa (Huang et al. 2024, arXiv:2405.18641).

    From the hub, from files with text and label, or as published: Class Index (1 to 4), Title and
    Description, the last two joined. The AG corpus is for non-commercial use.
    """

    hub: str | None = "fancyzhx/ag_news"
    """Hub id, used when `train` is not given."""
    test_split: str | None = "test"
    """Split of the hub set to evaluate on."""
    labels: Labels = Field(default={str(number): topic for number, topic in enumerate(TOPICS)})
    """Label in the data -> name."""
    instruction: str = (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n"
    )
    """Question before each item; `{labels}` is replaced by the names. Default: that of
    git-disl/Lisa (agnews/build_dataset.py)."""

    def prepare(self, record: Record) -> Record | None:
        """Rename the published columns; their classes are numbered from 1."""
        if "Class Index" not in record:
            return record
        number = str(record["Class Index"]).strip()
        parts = (str(record.get(name) or "").strip() for name in ("Title", "Description"))
        names = {str(place): topic for place, topic in enumerate(TOPICS, 1)}
        label = names.get(number, f"class {number}")
        return {"text": " ".join(part for part in parts if part), "label": label}
