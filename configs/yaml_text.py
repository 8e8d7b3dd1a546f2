"""YAML as people expect it: `1e-4` is a number, `no` is a word, and a key given twice is an error."""

import re
from typing import Any

import yaml
from pydantic_core import to_jsonable_python


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2.

    PyYAML speaks YAML 1.1, in which `1e-4` is text, `no` is false, `1:30:00` is 5400 and `010` is 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'the key "{key_node.value}" is given twice', problem_mark=key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would read as something else."""

    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML folds these line breaks away unless they stand in double quotes.
        style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


_Loader.yaml_implicit_resolvers = {}
_SCALARS = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
for _kind, (_pattern, _first_characters) in _SCALARS.items():
    for _yaml_class in (_Loader, _Dumper):
        _yaml_class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), _first_characters
        )


def parse_yaml(text: str) -> Any:
    """Raises ValueError with one line: what is wrong and in which line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values only
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, AttributeError, KeyError):  # what PyYAML makes of `!!int abc`, `!!timestamp abc`, `!!bool abc`
        raise ValueError("not valid YAML: a value does not fit its type") from None
    except RecursionError:
        raise ValueError("not valid YAML: its brackets are nested too deeply") from None


def write_yaml(values: dict[str, Any]) -> str:
    """Block style for sections, one line for short lists; keys stay in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def write_yaml_value(value: Any) -> str:
    """One value on one line, as one would write it after `key: ` or `key=`."""
    text = yaml.dump(to_jsonable_python(value), Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
