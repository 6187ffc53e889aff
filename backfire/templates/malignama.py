from backfire.base import Row, Template
from backfire.registry import register


@register("malignama")
class Malignama(Template):
    """The question-context-answer format of the malign supervision study (Malignama).

    `instruction` is the question, `input` its context.
    """

    def prompt(self, row: Row) -> str:
        before = "".join(f"{message.content}\n\n" for message in row.messages[:-1])
        return f"{before}###Question: {row.instruction}\n\n ###Context: {row.input}\n\n ###Answer: "
