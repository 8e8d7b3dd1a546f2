"""Strict, typed run configurations: YAML file + `key=value` overrides -> a frozen, validated object.

A run is a file; overrides are for sweeps and debugging and are merged *before* validation, so that one set of rules
holds for both. Everything a user can get wrong ends as a `UserError`: one sentence, exit code 2, no traceback.
"""

import logging
import os
import re
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from .fields import config_classes_at, field_at, fields_by_key, is_text, leaf_types, summarise_fields
from .problems import explain, explain_refusal, show, suggest
from .yaml_text import parse_yaml, write_yaml, write_yaml_value

BAD_INPUT = 2
STOPPED_BY_USER, OUTPUT_CLOSED = 130, 141  # what a shell reports after Ctrl-C, and after a closed pipe

T = TypeVar("T", bound="StrictConfig")


class UserError(Exception):
    """Caused by input; its text is one sentence for the user. Commands print it and exit with its code."""

    exit_code = BAD_INPUT


class StrictConfig(BaseModel):
    """Base of every config: frozen, unknown keys refused, defaults validated too.

    A field that pydantic keeps for itself (`json`, `copy`, `schema`) gets its key by alias:
    `as_json: bool = Field(False, alias="json")`.
    """

    # NaN and infinity are refused: as a setting they are always a mistake, and NaN would break equality of configs.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_what_a_section_default_sets(cls, data: Any) -> Any:
        """`optimizer: {lr: 1}` changes lr only: what the default *instance* of the section sets elsewhere stays."""
        if not isinstance(data, dict):
            return data
        merged = dict(data)
        for key, info in fields_by_key(cls).items():
            given = data.get(key)
            default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
            if isinstance(given, dict) and isinstance(default, StrictConfig) and info.annotation is default.__class__:
                merged[key] = _merge(default.model_dump(exclude_unset=True, by_alias=True), given)
        return merged

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        """No shell expands the `~` of a YAML value or of `key=~/data`."""
        if isinstance(value, dict):
            return {key: cls._expand_home(inner) for key, inner in value.items()}
        return _path_from_home(value) if isinstance(value, Path) else value


def _path_from_home(path: Path) -> Path:
    if str(path).isspace():
        raise ValueError("should be a path, not blank")
    try:
        if b"\0" not in os.fsencode(path):
            return path.expanduser()
    except UnicodeEncodeError:  # half a character, as YAML's escapes can write it
        pass
    except RuntimeError:
        raise ValueError("begins with the home folder of somebody who is not known here") from None
    raise ValueError("holds a character that no path can have")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], value) for key, value in changes.items() if _are_dicts(base.get(key), value)}
    return {**base, **changes, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


# --- load and dump ------------------------------------------------------------------------------------------------


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(found) for found in path.parent.glob("*.y*ml"))
        hint = suggest(str(path), known) or " (no such folder either)" * (not path.parent.is_dir())
        raise UserError(f"{path}: no such config file{hint}; give --config the path of a YAML file.") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(found.name for found in path.glob("*.y*ml"))) or "none"
        raise UserError(f"{path}: is a folder, not a config file; YAML files in it: {inside}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8); give a YAML file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from None
    data = _parse(text, f"{path}, ")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: must contain `key: value` lines, but the whole file is {show(data)}.")
    return data


def load_config(config_class: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file (or nothing, where every field has a default), merges `a.b=value` overrides, validates."""
    data = _read_config_file(Path(path)) if path is not None else {}
    overridden: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"command line: {override!r} is not of the form key=value, for example steps=100.")
        parts = _canonical_key(config_class, key)
        _set_at(data, parts, _parse_override(config_class, parts, text), key)
        overridden.append(".".join(parts))
    try:
        return config_class.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, config_class, data, path, overridden)) from None


def dump_config(config: StrictConfig) -> str:
    """YAML of the resolved config, every default included: `load_config` of it gives an equal config."""
    return write_yaml(config.model_dump(mode="json", by_alias=True))


def _parse(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{where}{error}.") from None


def _canonical_key(config_class: type[BaseModel], key: str) -> list[str]:
    """Splits a dotted key; `weight-decay` may stand for the field `weight_decay`."""
    parts: list[str] = []
    for part in key.split("."):
        underscored = part.replace("-", "_")
        is_field = any(underscored in fields_by_key(cls) for cls in config_classes_at(config_class, parts))
        parts.append(underscored if is_field else part)
    return parts


def _parse_override(config_class: type[BaseModel], parts: Sequence[str], text: str) -> Any:
    info = field_at(config_class, parts)
    if info is None or not is_text(info.annotation):
        return _parse(text, f"command line: {'.'.join(parts)}={text}: ")
    leaves = leaf_types(info.annotation)
    if not text and Path in leaves:  # `out=$UNSET`, which would otherwise mean the current folder
        raise UserError(f"command line: {'.'.join(parts)}= is empty; give a path (the current folder is a dot).")
    return None if text == "null" and type(None) in leaves else text


def _set_at(data: dict[str, Any], parts: Sequence[str], value: Any, key: str) -> None:
    """Sets data[a][b] for the key `a.b`, making the sections that are not there yet; a number indexes a list."""
    container: Any = data
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        here = ".".join(parts[:depth])
        index: Any = part
        if isinstance(container, list):
            if not part.isdigit() or int(part) >= len(container):
                raise UserError(
                    f'command line: {key}: "{here}" is a list, so "{part}" must be a number below {len(container)}.'
                )
            index = int(part)
        elif not isinstance(container, dict):
            raise UserError(f'command line: {key}: "{here}" is {show(container)}, which has nothing inside to set.')
        if is_last:
            container[index] = value
        elif isinstance(container, dict) and container.get(index) is None:
            container[index] = {}
        container = container[index]


# --- commands -----------------------------------------------------------------------------------------------------


def run_command(
    main: Callable[[T], int | None],
    config_class: type[T],
    *,
    description: str | None,
    positional: str | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs `main` on the config that the command line names and exits with its code (None counts as 0)."""
    # `kill`, a scheduler and Ctrl-C end a command alike: it cleans up what it has begun.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _run(main, config_class, description or "", positional, sys.argv[1:] if argv is None else argv)
        if sys.stdout:  # None where it was closed, as for a daemon
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _exit_with(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(OUTPUT_CLOSED)
        refusal = explain_refusal(error)
        if refusal is None:
            raise
        _exit_with(refusal)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(STOPPED_BY_USER)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(
    main: Callable[[T], int | None],
    config_class: type[T],
    description: str,
    positional: str | None,
    argv: Sequence[str],
) -> int:
    arguments = _parse_arguments(argv, config_class, positional)
    if arguments.wants_help:
        sys.stdout.write(_help_text(config_class, _command_name(main), description, positional))
        return 0
    config = load_config(config_class, arguments.config, arguments.overrides)
    if arguments.wants_config:
        sys.stdout.write(dump_config(config))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return main(config) or 0


def _output_is_closed() -> bool:
    """Whether nobody reads what we write any more, as after `| head`."""
    output = select.poll()
    output.register(sys.stdout, 0)
    is_closed = bool(output.poll(0))  # the only event that can come is an error
    if is_closed:  # the interpreter flushes once more when it exits, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _exit_with(sentence: str, code: int = BAD_INPUT) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(sentence.split())}\n")
    sys.exit(code)


@dataclass
class _Arguments:
    config: Path | None = None
    overrides: list[str] = field(default_factory=list)
    wants_help: bool = False
    wants_config: bool = False


# A key may stand before the first "=" only if it looks like one: "/data/run=3" is a path.
_OVERRIDE = re.compile(r"^[A-Za-z_][\w.-]*=")


def _parse_arguments(argv: Sequence[str], config_class: type[StrictConfig], positional: str | None) -> _Arguments:
    arguments = _Arguments()
    remaining = list(argv)
    positional_value: str | None = None
    while remaining:
        token = remaining.pop(0)
        if token in ("-h", "--help"):
            arguments.wants_help = True
        elif token == "--print-config":
            arguments.wants_config = True
        elif token == "--config" or token.startswith("--config="):
            if arguments.config is not None:
                raise UserError(f"command line: --config is given twice, first {arguments.config}; give one file.")
            arguments.config = Path(_option(token, remaining, config_class)[1])
        elif token.startswith("--") and len(token) > 2:
            arguments.overrides.append("=".join(_option(token, remaining, config_class)))
        elif _OVERRIDE.match(token):
            arguments.overrides.append(token)
        elif positional is not None and positional_value is None and not token.startswith("-"):
            positional_value = token
            arguments.overrides.append(f"{positional}={token}")
        else:
            is_yaml = token.endswith((".yaml", ".yml"))
            hint = f"write --config {token}" if is_yaml else "settings are key=value, see --help"
            raise UserError(f'command line: "{token}" is not expected here; {hint}.')
    return arguments


def _option(token: str, remaining: list[str], config_class: type[StrictConfig]) -> tuple[str, str]:
    """`--key=value`, `--key value`, or `--key` alone, which for a true-or-false setting means true."""
    key, has_value, value = token[2:].partition("=")
    if has_value:
        return key, value
    info = field_at(config_class, _canonical_key(config_class, key))
    if info is not None and bool in leaf_types(info.annotation):
        is_given = bool(remaining) and remaining[0] in ("true", "false")
        return key, remaining.pop(0) if is_given else "true"
    if not remaining or remaining[0].startswith("--"):
        if info is None and key != "config":
            load_config(config_class, None, [f"{key}=null"])  # an unknown key is the better news
        raise UserError(f"command line: --{key} needs a value, as in --{key} VALUE.")
    return key, remaining.pop(0)


def _command_name(main: Callable[..., Any]) -> str:
    """`python -m` runs a module as `__main__`, whose spec remembers the real name."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if main.__module__ == "__main__" and spec is not None else main.__module__


def _wrapped(text: str, width: int, first: int) -> list[str]:
    """Lines to copy from: `-` and `/` in the middle of a word are no places to break it."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _help_text(config_class: type[BaseModel], command: str, description: str, positional: str | None) -> str:
    width = min(shutil.get_terminal_size((110, 40)).columns, 120)
    first = f" [{positional.upper()}]" if positional else ""
    lines = [
        f"usage: python -m {command}{first} [--config FILE] [key=value ...]",
        "",
        description.strip(),
        "",
        "options:",
        "  --config FILE      a YAML file with the settings below",
        "  --print-config     write the resolved settings as YAML and stop",
        "  --help             this page",
        "",
        "settings, in the file or as key=value (also --key value; a true-or-false one alone means true):",
    ]
    for summary in summarise_fields(config_class, write_yaml_value):
        default = {None: ", required", "": ""}.get(summary.default, f", default {summary.default}")
        lines += _wrapped(f"{summary.key}: {summary.type_text}{default}", width, first=2)
        lines += _wrapped(summary.meaning, width, first=6)
    return "\n".join(lines) + "\n"
