"""YAML as it is meant: the core schema of YAML 1.2, where PyYAML follows 1.1.

Only `true` and `false` are truth values, so that a label No or Yes is a text; 010, 1_000, 1:30 and
2024-05-01 are texts as they stand, which a number's setting still reads as a number if it is one;
and 1e-4 is a number. A key given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from backfire.errors import UserError, shortened

_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*|(?=[eE])))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
"""Tag -> what a plain scalar of it looks like, and how it may begin."""

_HINTS = (
    (r"'\\t'", "indent with spaces, not with tabs"),
    (r"cannot start any token", "put a text that begins with it in quotes"),
    (r"mapping values are not allowed", "put a text that holds ': ' in quotes"),
    (r"expected alphabetic or numeric", "put a text that begins with * or & in quotes"),
    (r"undefined alias", "put a text that begins with * in quotes"),
    (r"could not determine a constructor", "put a text that begins with ! in quotes"),
    (r"another document", "leave out the line '---' between them"),
)


def read_yaml(text: str, what: str) -> Any:
    """The value that the text holds; `what` names it in errors.

    Raises:
        UserError: the text is not YAML, in one sentence that says the line.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        problem = problem.removeprefix("but ")
        hint = next((f"; {said}" for found, said in _HINTS if re.search(found, problem)), "")
        raise UserError(f"{what}{where}: not valid YAML: {shortened(problem)}{hint}.") from None
    except RecursionError:
        raise UserError(f"{what}: not valid YAML: it is nested too deeply.") from None
    except ValueError as error:
        problem = shortened(str(error).splitlines()[0])
        raise UserError(f"{what}: not valid YAML: {problem}.") from None
    except (AttributeError, LookupError, TypeError):  # PyYAML's own, for such as `!!bool maybe`
        raise UserError(f"{what}: not valid YAML: a value is not what its tag says.") from None


class Loader(yaml.SafeLoader):
    """Safe, of the core schema, and refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{shortened(key)}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Python does not even read or print one beyond 4,300 digits.
        if len(node.value) > 99 or abs(number := super().construct_yaml_int(node)) >= 2**63:
            raise ValueError(f"the number on line {node.start_mark.line + 1} is too large")
        return number


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _tag, (_pattern, _first) in _PLAIN.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
