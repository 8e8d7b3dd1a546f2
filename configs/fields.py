"""What a config class contains, read from its annotations: for --help and for naming the nearest valid key."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_TYPE_WORDS = {bool: "true | false", str: "text", Path: "path", type(None): "null", Any: "any"}
_CONSTRAINT_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}


@dataclass(frozen=True)
class FieldSummary:
    """One setting as --help shows it; `key` is dotted, `default` is None where the setting is required."""

    key: str
    type_text: str
    default: str | None
    meaning: str


def key_of(name: str, field: FieldInfo) -> str:
    """The key in YAML and on the command line. An alias allows keys such as `json` that pydantic keeps for itself."""
    return field.alias or name


def fields_by_key(config_class: type[BaseModel]) -> dict[str, FieldInfo]:
    return {key_of(name, field): field for name, field in config_class.model_fields.items()}


def nested_config_classes(annotation: Any) -> list[type[BaseModel]]:
    """Every config class inside an annotation, through unions, Annotated, lists, tuples and dicts, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in get_args(annotation):
        found.extend(inner for inner in nested_config_classes(argument) if inner not in found)
    return found


def leaf_types(annotation: Any) -> set[Any]:
    """The types that a value may have: {Path, NoneType} for `Path | None`; a container counts as one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaf_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(leaf_types(argument) for argument in get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def is_text(annotation: Any) -> bool:
    """True where every value but null is text, so that `name=001` and `path=[a]` mean what they say."""
    leaves = leaf_types(annotation) - {type(None)}
    return all(isinstance(leaf, type) and issubclass(leaf, str | Path | Enum) for leaf in leaves) and bool(leaves)


def config_classes_at(config_class: type[BaseModel], location: Sequence[str | int]) -> list[type[BaseModel]]:
    """The config classes that may stand at a location of field names, indices, dict keys and pydantic's union tags."""
    classes: list[type[BaseModel]] = [config_class]
    for part in location:
        inside = [fields_by_key(cls)[str(part)] for cls in classes if str(part) in fields_by_key(cls)]
        if inside:
            classes = [nested for field in inside for nested in nested_config_classes(field.annotation)]
            continue
        tagged = [cls for cls in classes if part == cls.__name__ or part in literal_values(cls)]
        classes = tagged or classes
    return classes


def field_at(config_class: type[BaseModel], location: Sequence[str | int]) -> FieldInfo | None:
    """The field that a location names, or None where there is no such field."""
    for cls in config_classes_at(config_class, location[:-1]):
        if location and str(location[-1]) in fields_by_key(cls):
            return fields_by_key(cls)[str(location[-1])]
    return None


def literal_values(config_class: type[BaseModel]) -> set[Any]:
    """Values of fields that allow just one, such as `kind: Literal["lerobot"]`: they tell union members apart."""
    annotations = [field.annotation for field in config_class.model_fields.values()]
    return {get_args(annotation)[0] for annotation in annotations if _is_tag(annotation)}


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words that a YAML author knows: `int | null`, `list of text`, `adamw | muon`, `float > 0`."""
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in _CONSTRAINT_SIGNS.items()
        if getattr(item, name, None) is not None
    ]
    return " ".join([_plain_type_text(annotation), " and ".join(limits)]).strip()


def _plain_type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPE_WORDS:
        return _TYPE_WORDS[annotation]
    if origin is Annotated:
        return type_text(arguments[0], _flat_metadata(arguments[1:]))
    if origin is Literal:
        return " | ".join("null" if value is None else str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_plain_type_text(argument) for argument in arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {_plain_type_text(arguments[0])} to {_plain_type_text(arguments[1])}"
    if origin is tuple and arguments and arguments[-1] is not ...:
        return f"[{', '.join(_plain_type_text(argument) for argument in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset):
        return f"list of {_plain_type_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tags = sorted(str(value) for value in literal_values(annotation))
        return f"section ({', '.join(tags)})" if tags else "section"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    return getattr(annotation, "__name__", str(annotation))


def _flat_metadata(metadata: Sequence[Any]) -> list[Any]:
    """Annotated[float, Field(gt=0)] hides its limits inside the FieldInfo."""
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def summarise_fields(
    config_class: type[BaseModel],
    to_text: Any,
    *,
    prefix: str = "",
    defaults: BaseModel | None = None,
    parents: tuple[type[BaseModel], ...] = (),
) -> Iterator[FieldSummary]:
    """Every setting of a config class, sections opened in place; `to_text` writes a default value as YAML.

    Where one of several sections may stand, what they share comes once, and each one's own after the tag that names it.
    """
    for name, field in config_class.model_fields.items():
        key = prefix + key_of(name, field)
        default = getattr(defaults, name) if defaults is not None else _default_value(field)
        nested = nested_config_classes(field.annotation)
        is_section = isinstance(default, BaseModel)
        default_text = "" if is_section else None if _is_required(field, defaults) else to_text(default)
        if nested and field.annotation in nested and _is_required(field, defaults):
            default_text = ""  # a plain section: what is required inside says so itself
        if _is_tag(field.annotation):
            default_text = ""  # its type has said it
        yield FieldSummary(key, type_text(field.annotation, field.metadata), default_text, field.description or "")
        sections = [
            list(
                summarise_fields(
                    cls,
                    to_text,
                    prefix=f"{key}{_placeholder(field.annotation)}.",
                    defaults=default if isinstance(default, cls) else None,
                    parents=(*parents, config_class),
                )
            )
            for cls in nested
            if cls not in (*parents, config_class)  # a class that contains itself is shown once
        ]
        yield from _common_first(sections)


def _common_first(sections: Sequence[Sequence[FieldSummary]]) -> Iterator[FieldSummary]:
    """Of sections that may stand in one place: once what all of them have, then what each has of its own."""
    common = set.intersection(*map(set, sections)) if len(sections) > 1 else set()
    yield from dict.fromkeys(summary for section in sections for summary in section if summary in common)
    for section in sections:
        yield from (summary for summary in section if summary not in common)


def _is_tag(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _is_required(field: FieldInfo, defaults: BaseModel | None) -> bool:
    return defaults is None and field.is_required()


def _default_value(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _placeholder(annotation: Any) -> str:
    """`.0` for a list of sections, `.NAME` for a mapping of them."""
    for leaf in (annotation, *get_args(annotation)):
        origin = get_origin(leaf)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return ".NAME"
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return ".0"
    return ""
