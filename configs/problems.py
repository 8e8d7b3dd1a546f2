"""A failed validation told in one sentence: where, what, what is allowed, the next move."""

import difflib
import errno
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .fields import config_classes_at, fields_by_key, summarise_fields


def suggest(given: str, known: Sequence[str]) -> str:
    """The nearest valid name, or all of them where none is near."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; it can be {', '.join(known)}" if known else ""


def ended(sentence: str) -> str:
    """With its full stop, where it has no mark of its own: a hint may end as a question."""
    bare = sentence.rstrip(".")
    return bare if bare.endswith(("?", "!")) else f"{bare}."


def show(value: Any) -> str:
    names = {dict: "a section", type(None): "empty"}
    return names.get(type(value)) or reprlib.repr(value)


def explain(
    error: ValidationError,
    config_class: type[BaseModel],
    data: dict[str, Any],
    path: Path | None,
    overridden: Sequence[str],
) -> str:
    """One sentence for the first problem (an unknown key first: it often explains a missing one), and how many more."""
    problems: dict[str, list[Any]] = {}
    for details in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        problems.setdefault(_dotted_key(details, data), []).append(details)
    for key in [key for key in problems if any(other.startswith(f"{key}.") for other in problems)]:
        del problems[key]  # of what may be this or that: what is wrong inside tells more than that it is not the other
    key, same_place = next(iter(problems.items()))
    is_override = any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden)
    where = "command line" if is_override or path is None else str(path)
    details = same_place[0]
    if details["type"] in ("extra_forbidden", "invalid_key"):  # the latter: a key that is not even text
        sentence = f'{where}: unknown key "{key}"{_nearest_key(config_class, details["loc"], key)}'
    elif details["type"] == "missing":
        sentence = f'{where}: "{key}" is required but not given; add it to the config file or write {key}=VALUE'
    elif details["type"] in ("union_tag_not_found", "union_tag_invalid"):
        sentence = f"{where}: {key} {_wrong_kind(config_class, details)}"
    else:
        reasons = " or ".join(dict.fromkeys(_reason(item) for item in same_place))
        given = "" if isinstance(details["input"], dict) else f" is {show(details['input'])}, but"
        sentence = f"{where}: {key}{given} {reasons}" if key else f"{where}: {reasons}"
    more = f" ({len(problems) - 1} more after this one)" if len(problems) > 1 else ""
    return ended(f"{sentence.rstrip('.')}{more}")


def _dotted_key(details: Any, data: Any) -> str:
    """pydantic's location without the union tags that it mixes in: what is in the data, and perhaps a missing leaf."""
    location, may_lack = details["loc"], details["type"] in ("missing", "invalid_key")
    parts: list[str] = []
    for depth, part in enumerate(location):
        is_key = isinstance(data, dict) and part in data
        is_index = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if is_key or is_index:
            parts.append(str(part))
            data = data[part]
        elif may_lack and depth == len(location) - 1 and isinstance(data, list if isinstance(part, int) else dict):
            parts.append(str(part))
    return ".".join(parts)


def _nearest_key(config_class: type[BaseModel], location: Sequence[str | int], key: str) -> str:
    siblings = [name for cls in config_classes_at(config_class, location[:-1]) for name in fields_by_key(cls)]
    section, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{f"{section}." if section else ""}{near[0]}"?'
    elsewhere = [summary.key for summary in summarise_fields(config_class, str) if summary.key.split(".")[-1] == last]
    if elsewhere:
        return f'; did you mean "{elsewhere[0]}"?'
    return f"; the keys {f'of {section} ' if section else ''}are {', '.join(dict.fromkeys(siblings))}"


_FINDS_THE_KIND = {"sources": "`python -m data_pipeline.doctor PATH` finds it out"}
"""Section -> how to learn what to write, where there is a command for that."""


def _wrong_kind(config_class: type[BaseModel], details: Any) -> str:
    """Of a section whose setting `kind`, or another, says which settings it has."""
    name, location = details["ctx"]["discriminator"].strip("'"), details["loc"]
    known: list[str] = []
    for place in (location, location[:-1]):  # a name that the user gave may also be that of a field
        known = known or [
            value
            for cls in config_classes_at(config_class, place)
            if name in cls.model_fields
            for value in get_args(cls.model_fields[name].annotation)
        ]
    if details["type"] == "union_tag_invalid":
        sentence = f'has the unknown {name} "{details["ctx"]["tag"]}"{suggest(details["ctx"]["tag"], known)}'
    else:
        sentence = f"needs a {name} ({', '.join(known)})"
    finds_it = _FINDS_THE_KIND.get(location[0])
    return sentence if sentence.endswith("?") or finds_it is None else f"{sentence}; {finds_it}"


def _reason(details: Any) -> str:
    """pydantic's message as the end of our sentence."""
    message = str(details["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = re.sub(r"^(?:Input|String|Dictionary) (should|tag|is)", lambda match: match.group(1), message)
    if details["type"] in ("path_type", "bool_type", "bool_parsing"):
        return "should be a path" if details["type"] == "path_type" else "should be true or false"
    if details["type"] in ("tuple_type", "list_type"):
        return "should be a list (write [a, b])"
    if details["type"] == "too_short":
        return f"needs at least {details['ctx']['min_length']}"
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        known = re.findall(r"'([^']*)'", str(details["ctx"]["expected"]))
        near = difflib.get_close_matches(details["input"], known, n=1)
        return message + (f'; did you mean "{near[0]}"?' if near else "")
    return message


# --- the file system ----------------------------------------------------------------------------------------------

_NEXT_MOVES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there and start the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another path"),
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENOTDIR: "a file stands where a folder should be, so choose another path",
    errno.EISDIR: "a folder stands where a file should be, so choose another path",
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "move away what is there or choose another path"),
    errno.EFBIG: "raise the limit of the size of files (`ulimit -f`) and start the same command again",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "a link leads back to itself, so choose another path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}


def explain_refusal(error: OSError) -> str | None:
    """What the file system refuses (a full disk, a folder that may not be written, a file in the way), in one sentence.

    None for other errors: a file that suddenly is not there, for example, may well be our own mistake.
    """
    if (error.strerror or "").startswith("No usable temporary directory"):  # as `tempfile` says it
        return f"{error.strerror}; set TMPDIR to a folder that can be written."
    if error.errno not in _NEXT_MOVES:
        return None
    where = error.filename2 or error.filename
    return f"{f'{where}: ' if where else ''}{error.strerror}; {_NEXT_MOVES[error.errno]}."
