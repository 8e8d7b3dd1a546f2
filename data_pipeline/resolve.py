"""Opens a build's sources and settles what its config leaves open: rates, views, robots."""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.loader import UserError
from configs.problems import ended, suggest

from .align import actions_per_frame
from .build_config import BuildConfig
from .curate.aesthetic import open_scorer
from .curate.episode import CuratePlan, SourcePlan, view_name
from .curate.text_cover import open_text_detector
from .embodiments import Embodiment
from .sources import FORMATS, AnySourceConfig, Source, SourceError, detect_kind, open_source
from .video_io import ViewConfig

Listing = Mapping[str, Sequence[str]]
"""Source -> its episodes."""


def open_sources(config: BuildConfig) -> tuple[dict[str, Source], dict[str, list[str]]]:
    sources: dict[str, Source] = {}
    listing: dict[str, list[str]] = {}
    for name, source in config.sources.items():
        if source.name not in (None, name):
            raise UserError(f"sources.{name}.name={source.name}: a source is named by its key; leave `name` out.")
        reader = _reader_config(name, source, config.root)
        with _reading(name), _telling_another_kind(reader):
            sources[name] = open_source(reader)
            listing[name] = sources[name].list_episodes()[: source.max_episodes]
        if not listing[name]:
            raise UserError(f"sources.{name}: {config.root / source.path} holds no episodes; check the path.")
    return sources, listing


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """UserError, with the source's name, where what its episodes share cannot be read."""
    try:
        yield
    except SourceError as error:
        raise UserError(f"sources.{name}: {error.where}: {error.detail}.") from error
    except UserError as error:
        raise UserError(f"sources.{name}: {error}") from error


@contextmanager
def _telling_another_kind(config: AnySourceConfig) -> Iterator[None]:
    """UserError with the right kind, where recordings cannot be opened as what the config says they are."""
    try:
        yield
    except UserError as error:
        try:
            kind = detect_kind(config.path)
        except UserError:
            kind = config.kind
        if kind == config.kind:
            raise error
        hint = f"it looks like {FORMATS[kind].looks_like}, so set sources.{config.name}.kind={kind}"
        raise UserError(f"{str(error).removesuffix('.')}; {hint}.") from error


def _reader_config(name: str, source: AnySourceConfig, root: Path) -> AnySourceConfig:
    """What travels to the workers: absolute, because a worker's folder may be another."""
    return source.model_copy(update={"name": name, "path": (root / source.path).absolute()})


def resolve(config: BuildConfig, sources: Mapping[str, Source], listing: Mapping[str, list[str]]) -> CuratePlan:
    """The plan; what it needs and the config leaves open is taken from the sources themselves."""
    embodiments = {}
    for name, source in sources.items():
        with _reading(name):
            embodiments[name] = _embodiment(source, config.sources[name].embodiment_name)
    _check_embodiments(embodiments)
    _check_curation(config, [robot for robot in embodiments.values() if robot is not None])
    labelled = [name for name, embodiment in embodiments.items() if embodiment is not None]
    main_source = labelled[0] if labelled else next(iter(sources))
    fps = config.fps or _first_readable(sources[main_source], listing[main_source]).fps
    control_hz = next((e.control_hz for e in embodiments.values() if e is not None), fps)
    return CuratePlan(
        staging=staging_folder(config.out),
        run=uuid.uuid4().hex,
        sources={
            name: SourcePlan(config=_reader_config(name, source, config.root), embodiment=embodiments[name])
            for name, source in config.sources.items()
        },
        views=config.views or _views_of_first_source(config, sources, listing),
        num_frames=config.clip_frames,
        fps=fps,
        stride=config.stride or config.clip_frames - 1,
        actions_per_frame=config.actions_per_frame or actions_per_frame(control_hz, fps),
        crf=config.crf,
        shots=config.shots,
        idle=config.idle,
        filters=config.filters,
    )


def staging_folder(out: Path) -> Path:
    return out.absolute().with_name(out.name + ".staging")


def _first_readable(source: Source, episodes: Iterable[str]) -> Any:
    error: SourceError | None = None
    for episode_id in episodes:
        try:
            return source.read_episode(episode_id)
        except SourceError as one:
            error = error or one
    assert error is not None
    raise UserError(
        f"source {source.name}: none of its episodes can be read, the first because of {error.reason} "
        f"({error.where}: {error.detail}); `python -m data_pipeline.doctor` lists what is wrong with it."
    )


def _views_of_first_source(
    config: BuildConfig, sources: Mapping[str, Source], listing: Mapping[str, list[str]]
) -> dict[str, ViewConfig]:
    name, source = next(iter(sources.items()))
    recorded = _first_readable(source, listing[name]).views
    view_map = config.sources[name].view_map or {view: view_name(view) for view in recorded}
    names = [view_map[view] for view in recorded if view in view_map]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"sources.{name}: its views {', '.join(recorded) or '(none)'} cannot be told apart by name; "
            "set `views` and `view_map`."
        )
    return {view: ViewConfig(height=config.height, width=config.width) for view in names}


def _embodiment(source: Source, name: str | None) -> Embodiment | None:
    embodiment = source.embodiment()
    return embodiment if embodiment is None or name is None else embodiment.model_copy(update={"name": name})


def _check_embodiments(embodiments: Mapping[str, Embodiment | None]) -> None:
    seen: dict[str, tuple[str, Embodiment]] = {}
    for source, embodiment in embodiments.items():
        if embodiment is None:
            continue
        other, known = seen.setdefault(embodiment.name, (source, embodiment))
        if known.model_copy(update={"control_hz": embodiment.control_hz}) != embodiment:  # their statistics are shared
            raise UserError(
                f"sources {other} and {source} both call their robot {embodiment.name!r}, but describe its actions or "
                f"proprio differently; set sources.{source}.embodiment_name."
            )


def _check_curation(config: BuildConfig, robots: Sequence[Embodiment]) -> None:
    if config.filters.aesthetic is not None:
        open_scorer(config.filters.aesthetic)  # says what is wrong with the weights
    if config.filters.text is not None:
        open_text_detector(config.filters.text)
    unknown = config.idle.unknown_slots(robots)
    if unknown:
        known = sorted({name for robot in robots for name in (*robot.action_names, *robot.proprio_names)})
        raise UserError(ended(f"idle.tolerances: no robot has a slot {unknown[0]!r}{suggest(unknown[0], known)}"))
