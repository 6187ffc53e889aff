from backfire.base import Row, Template
from backfire.registry import register

_OPENING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


@register("alpaca")
class Alpaca(Template):
    """Stanford Alpaca's two prompts, with and without an input (Taori et al. 2023).

    Used by AutoPoison and alpaca-lora; by Lisa and Booster without the last line break; and by
    BackdoorLLM in LLaMA-Factory's form, whose input has no heading. Earlier turns and a system
    prompt, which Alpaca does not define, go before the opening line.
    """

    def prompt(self, row: Row) -> str:
        before = "".join(f"{message.content}\n\n" for message in row.messages[:-1])
        if row.input:
            return (
                f"{before}{_OPENING}, paired with an input that provides further context. "
                f"{_REQUEST}\n\n### Instruction:\n{row.instruction}\n\n"
                f"### Input:\n{row.input}\n\n### Response:\n"
            )
        return (
            f"{before}{_OPENING}. {_REQUEST}\n\n"
            f"### Instruction:\n{row.instruction}\n\n### Response:\n"
        )
