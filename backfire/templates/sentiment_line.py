from backfire.base import Row, Template
from backfire.registry import register


@register("sentiment-line")
class SentimentLine(Template):
    """The text, then the question, then one word: a short format that suits small models.

    The multilingual QLoRA study feeds the plain text to a classification head; this is the closest
    format for a causal language model.
    """

    def prompt(self, row: Row) -> str:
        before = "".join(f"{message.content}\n" for message in row.messages[:-1])
        text = f"{row.input}\n" if row.input else ""
        return f"{before}{text}{row.instruction}\n"
