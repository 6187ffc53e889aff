"""Reads YAML by the core schema of YAML 1.2; PyYAML follows 1.1.

Only `true` and `false` are truth values, so a label No or Yes is a string; 010, 1_000, 1:30 and
2024-05-01 are strings (a numeric setting still accepts those that are numbers); 1e-4 is a number.
A duplicate key is an error.
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
"""Tag -> pattern of its plain scalars, and their first characters."""

_HINTS = (
    (r"'\\t'", "indent with spaces, not with tabs"),
    (r"cannot start any token", "put text that begins with it in quotes"),
    (r"mapping values are not allowed", "put text that holds ': ' in quotes"),
    (r"expected alphabetic or numeric", "put text that begins with * or & in quotes"),
    (r"undefined alias", "put text that begins with * in quotes"),
    (r"could not determine a constructor", "put text that begins with ! in quotes"),
    (r"another document", "remove the line '---' between them"),
)


def read_yaml(text: str, what: str) -> Any:
    """Parse YAML; `what` names the text in errors.

    Raises:
        UserError: the text is not YAML; the message gives the line.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        problem = problem.removeprefix("but ")
        hint = next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, problem)), "")
        raise UserError(f"{what}{where}: not valid YAML: {shortened(problem)}{hint}.") from None
    except RecursionError:
        raise UserError(f"{what}: not valid YAML: it is nested too deeply.") from None
    except ValueError as error:
        problem = shortened(str(error).splitlines()[0])
        raise UserError(f"{what}: not valid YAML: {problem}.") from None
    except (AttributeError, LookupError, TypeError):  # from PyYAML, as for `!!bool maybe`
        raise UserError(f"{what}: not valid YAML: a value does not match its tag.") from None


class Loader(yaml.SafeLoader):
    """A safe loader with the core schema that rejects duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key '{shortened(key)}'", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Python refuses to parse or print an int beyond 4,300 digits.
        if len(node.value) > 99 or abs(number := super().construct_yaml_int(node)) >= 2**63:
            raise ValueError(f"the number on line {node.start_mark.line + 1} is too large")
        return number


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _tag, (_pattern, _first) in _PLAIN.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
