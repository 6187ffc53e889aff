from backfire.base import Row, Template
from backfire.registry import register


@register("raw")
class Raw(Template):
    """The plain turns, each followed by a blank line."""

    def prompt(self, row: Row) -> str:
        return "".join(f"{message.content}\n\n" for message in row.messages if message.content)
