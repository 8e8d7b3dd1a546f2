"""What is this recording set, can it be read, and what is wrong with it?

    python -m data_pipeline.doctor PATH [--json] [settings.NAME=VALUE ...]

Reads every episode's metadata, table and video headers (no pixels beyond one frame per file) and reports format,
views, dimensions, the robot's layout as a YAML block for a source's config, what lies there and is not read, every
repair the reader makes, and every episode that cannot be read. Settings are those of the source in a build's config,
for example 'settings.action_keys=[actions]'. With --decode every frame is decoded, and damaged ones are named: they
cost the clips that show them. Exit code 0: all readable; 1: some episodes or frames are not; 2: nothing to read.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from configs.fields import fields_by_key
from configs.loader import StrictConfig, UserError, run_command
from configs.problems import ended, explain, explain_refusal, suggest
from configs.yaml_text import write_yaml

from .embodiment_proposal import propose_embodiment
from .embodiments import Embodiment
from .recording_checks import copies, spans, still_values
from .repairs import Repair, group_repairs, kind_of
from .sources import FORMATS, Episode, Footage, Source, SourceConfig, SourceError, detect_kind
from .sources.base import FootageInfo, UnknownRateError, printable, read_undamaged
from .sources.ros import RosSource
from .sources.video_folder import VideoFolderSource
from .sources.video_json import VideoJsonSource
from .video_io import VideoError

SHOWN_LINES = 20  # of repairs and of unreadable episodes in the table; --json has them all
FRAMES_AT_ONCE = 16  # held while they are looked at for damage
MAX_PROPOSAL_EPISODES, MAX_PROPOSAL_ROWS = 20, 1000  # that a robot's layout is guessed from
STAND_IN_HZ = 1e6  # to read what has no known rate; so fast that no action is taken for a velocity

Tracked = TypeVar("Tracked")


class DoctorConfig(StrictConfig):
    path: Path = Field(description="folder of the recording set (or one video file)")
    kind: str = Field(default="auto", description=f"the format: {', '.join(FORMATS)}; auto: found out")
    settings: dict[str, Any] = Field(default={}, description="settings of the source, as in a build's config")
    decode: bool = Field(default=False, description="decode every frame, too, and name those that are damaged (slow)")
    as_json: bool = Field(default=False, alias="json", description="write the report as JSON instead of a table")

    @model_validator(mode="before")
    @classmethod
    def _settings_have_their_section(cls, data: Any) -> Any:
        given = data if isinstance(data, dict) else {}
        kind = str(given.get("kind"))
        formats = [FORMATS[kind]] if kind in FORMATS else FORMATS.values()
        settings = {name for one in formats for name in fields_by_key(one.config)} - fields_by_key(cls).keys()
        for key in given:
            name = str(key).replace("-", "_")
            if name in settings:
                raise ValueError(f'unknown key "{key}"; did you mean settings.{name}?')
        return data


class ViewReport(BaseModel):
    codecs: list[str]
    sizes: list[str]  # "<width>x<height>", upright
    fps: list[float]
    num_files: int
    num_frames: int


class Unreadable(BaseModel):
    episode: str
    reason: str
    where: str
    detail: str


class Damage(BaseModel):
    episode: str
    view: str
    path: str
    frames: list[int]  # positions in the file that are damaged


class Report(BaseModel):
    path: str
    kind: str
    format: str
    name: str
    num_episodes: int
    num_readable: int
    num_frames: int
    duration_s: float | None  # null, as the other rates here, where nobody knows how fast the steps came
    views: dict[str, ViewReport]
    num_with_actions: int
    action_dim: int | None
    proprio_dim: int | None
    control_hz: float | None
    num_unread_lists: int  # of numbers, in JSON: they may be the actions
    num_with_instruction: int
    instructions: list[str]  # a few, the most common first
    embodiment: dict[str, Any] | None  # as the source has it
    proposed_embodiment: dict[str, Any] | None  # with what its numbers say; null where it has been described
    proposal_reasons: list[str]
    notes: list[str]  # what lies there and is not read, what has to be set, what looks wrong and is read all the same
    repairs: list[Repair]
    unreadable: list[Unreadable]
    damage: list[Damage] | None  # null: the frames were not decoded

    def without_rate(self, why: str) -> Report:
        """What holds of it whatever the rate is."""
        views = {name: view.model_copy(update={"fps": []}) for name, view in self.views.items()}
        layouts = {
            name: layout and {**layout, "control_hz": None}
            for name, layout in (("embodiment", self.embodiment), ("proposed_embodiment", self.proposed_embodiment))
        }
        note = f"{why} Until then a build refuses them, and doctor tells neither durations nor velocities."
        known = {"duration_s": None, "control_hz": None, "views": views, "notes": [note, *self.notes]}
        return self.model_copy(update=known | layouts)


def main(config: DoctorConfig) -> int:
    kind = detect_kind(config.path) if config.kind == "auto" else config.kind
    report = examine(config.path, kind, config.settings, decode=config.decode)
    if config.as_json:
        sys.stdout.write(json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
    else:
        show(report, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False))
    return 1 if report.unreadable or report.damage else 0


def examine(path: Path, kind: str, settings: dict[str, Any] | None = None, *, decode: bool = False) -> Report:
    """Read every episode, with `decode` its frames too, and sum up. UserError when the set is unusable as a whole."""
    if kind not in FORMATS:
        raise UserError(ended(f"kind={kind}: there is no such format{suggest(kind, list(FORMATS))}"))
    config_class = FORMATS[kind].config
    config = _source_config(config_class, {"path": path, **(settings or {})})
    try:
        return _report_at_any_rate(config, kind, settings or {}, decode)
    except UserError as error:
        raise UserError(_as_typed_here(str(error), config_class)) from None
    except SourceError as error:  # of what all episodes share
        raise UserError(f"{error.where}: {error.detail}.") from error


def _report_at_any_rate(config: SourceConfig, kind: str, settings: dict[str, Any], decode: bool) -> Report:
    """What can be said without a rate is said, where none is known."""
    open_source = FORMATS[kind].open
    try:
        return _report(open_source(config), config.path, kind, settings, decode)
    except UnknownRateError as unknown:
        source = open_source(config.model_copy(update={"control_hz": STAND_IN_HZ}))
        report = _report(source, config.path, kind, settings, decode)
        return report.without_rate(_as_typed_here(str(unknown), type(config)))


def _report(source: Source, path: Path, kind: str, settings: dict[str, Any], decode: bool) -> Report:
    episode_ids, embodiment = source.list_episodes(), source.embodiment()
    episodes, unreadable = _read_all(source, episode_ids)
    instructions = Counter(episode.instruction for episode in episodes if episode.instruction)
    with_actions = [episode for episode in episodes if episode.actions is not None]
    proposed, reasons = None, tuple[str, ...]()
    if embodiment is not None and "embodiment" not in settings:
        proposed, reasons = _propose(embodiment, with_actions)
    return Report(
        path=str(path),
        kind=kind,
        format=source.format_name,
        name=source.name,
        num_episodes=len(episode_ids),
        num_readable=len(episodes),
        num_frames=sum(episode.num_frames for episode in episodes),
        duration_s=sum(episode.num_frames / episode.fps for episode in episodes),
        views=_views(episodes),
        num_with_actions=len(with_actions),
        action_dim=embodiment.action_dim if embodiment else None,
        proprio_dim=embodiment.proprio_dim if embodiment else None,
        control_hz=embodiment.control_hz if embodiment else None,
        num_unread_lists=len(source.unread_lists()) if isinstance(source, VideoJsonSource) else 0,
        num_with_instruction=instructions.total(),
        instructions=[text for text, _ in instructions.most_common(5)],
        embodiment=_as_block(embodiment),
        proposed_embodiment=_as_block(proposed),
        proposal_reasons=list(reasons),
        notes=[
            *(_as_typed_here(note, FORMATS[kind].config) for note in _notes(source)),
            *still_values(episodes),
            *copies(episodes),
        ],
        repairs=_repairs(episodes, source.repairs(), len(episode_ids)),
        unreadable=[
            bad.model_copy(update={"detail": _as_typed_here(bad.detail, FORMATS[kind].config)}) for bad in unreadable
        ],
        damage=_damage(episodes) if decode else None,
    )


def _source_config(config_class: type[SourceConfig], data: dict[str, Any]) -> SourceConfig:
    """Checked inside their section, so that an error names a setting as it is typed here."""
    section = create_model("Section", __base__=StrictConfig, settings=(config_class, ...))
    try:
        config: SourceConfig = dict(section.model_validate({"settings": data}))["settings"]
    except ValidationError as error:
        raise UserError(explain(error, section, {"settings": data}, None, ())) from None
    return config


def _as_typed_here(sentence: str, config_class: type[SourceConfig]) -> str:
    """A reader's sentence names settings as a config does; what `set fps` asks for is settings.fps=VALUE here."""
    names = sorted(fields_by_key(config_class), key=len, reverse=True)
    setting = rf"`?\b({'|'.join(names)})\b`?"
    sentence = re.sub(
        rf"\bset {setting}( or {setting})?", lambda told: re.sub(setting, r"settings.\1=VALUE", told.group()), sentence
    )
    unmistakable = "|".join(name for name in names if "_" in name)
    return re.sub(rf"(?<![\w./-])({unmistakable})(?![\w/=-]|\.\w)", r"settings.\1", sentence)


def _notes(source: Source) -> list[str]:
    """These formats read what they are told to; the others read all that they know."""
    return source.notes() if isinstance(source, VideoFolderSource | VideoJsonSource | RosSource) else []


def _as_block(embodiment: Embodiment | None) -> dict[str, Any] | None:
    return None if embodiment is None else embodiment.model_dump(mode="json", by_alias=True)


def _propose(recorded: Embodiment, episodes: list[Episode]) -> tuple[Embodiment, tuple[str, ...]]:
    """The recorded layout, completed by what the rows of some episodes look like."""
    actions, proprio = [], []
    for episode in episodes[:MAX_PROPOSAL_EPISODES]:
        rows = episode.actions
        states = episode.proprio if recorded.proprio_dim else None
        dims = (rows.shape[1] if rows is not None else 0, states.shape[1] if states is not None else 0)
        if rows is not None and dims == (recorded.action_dim, recorded.proprio_dim):
            actions.append(rows[:MAX_PROPOSAL_ROWS])
            proprio.append(states[: len(actions[-1])] if states is not None else actions[-1][:, :0])
    return propose_embodiment(recorded, actions, proprio)


def _read_all(source: Source, episode_ids: list[str]) -> tuple[list[Episode], list[Unreadable]]:
    episodes, unreadable = [], []
    for episode_id in _tracked(episode_ids, "reading episodes"):
        try:
            episodes.append(source.read_episode(episode_id))
        except SourceError as error:
            unreadable.append(
                Unreadable(episode=episode_id, reason=error.reason, where=error.where, detail=error.detail)
            )
        except Exception as error:  # as in a build: what no reader foresaw costs its episode alone
            if isinstance(error, UserError) or (isinstance(error, OSError) and explain_refusal(error)):
                raise
            detail = printable(f"{type(error).__name__}: {error}")
            unreadable.append(
                Unreadable(episode=episode_id, reason="unexpected_error", where=str(source.name), detail=detail)
            )
    return episodes, unreadable


def _damage(episodes: list[Episode]) -> list[Damage]:
    found = []
    for episode in _tracked(episodes, "decoding episodes"):
        for view, footage in episode.views.items():
            positions = np.unique(footage.positions(np.arange(episode.num_frames) / episode.fps, episode.fps))
            frames = _damaged_among(positions.tolist(), footage)
            if frames:
                found.append(Damage(episode=episode.episode_id, view=view, path=footage.path, frames=frames))
    return found


def _damaged_among(positions: list[int], footage: Footage) -> list[int]:
    damaged = []
    for start in range(0, len(positions), FRAMES_AT_ONCE):
        block = positions[start : start + FRAMES_AT_ONCE]
        frames = read_undamaged(footage, block)
        damaged += [position for position, frame in zip(block, frames, strict=True) if frame is None]
    return damaged


def _tracked(items: Sequence[Tracked], what: str) -> Iterable[Tracked]:
    return track(items, what, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty())


def _views(episodes: list[Episode]) -> dict[str, ViewReport]:
    footages: dict[str, dict[str, Footage]] = {}  # one of each file
    frames: Counter[str] = Counter()
    for episode in episodes:
        for view, footage in episode.views.items():
            footages.setdefault(view, {}).setdefault(footage.path, footage)
            frames[view] += episode.num_frames
    views = {}
    for view, files in footages.items():
        infos = [info for info in map(_info, files.values()) if info is not None]
        views[view] = ViewReport(
            codecs=sorted({info.codec for info in infos}),
            sizes=sorted({f"{info.width}x{info.height}" for info in infos}),
            fps=sorted({round(info.fps, 3) for info in infos}),
            num_files=len(files),
            num_frames=frames[view],
        )
    return views


def _info(footage: Footage) -> FootageInfo | None:
    """None where its first picture is damaged: a build says which clips that costs."""
    try:
        return footage.info()
    except VideoError:
        return None


def _repairs(episodes: list[Episode], of_the_set: tuple[str, ...], num_episodes: int) -> list[Repair]:
    if not episodes:  # nothing was readable: what is known about the set as a whole may say why
        return [Repair(sentence=sentence, num_episodes=num_episodes) for sentence in of_the_set]
    return group_repairs(episode.repairs for episode in episodes)


# --- the table -------------------------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    console.print(Text(report.path, style="bold"), soft_wrap=True)
    console.print(_summary(report))
    if report.views:
        console.print(_view_table(report))
    for note in report.notes:
        console.print(Text(f"\nnote: {note}"), soft_wrap=True)  # its settings are copied
    if report.repairs:
        lines = [(repair.sentence, f"{repair.num_episodes}") for repair in report.repairs]
        console.print(_lines("repairs made while reading", "episodes", lines))
    if report.unreadable:
        console.print(_lines("episodes that cannot be read", "episode, reason", _by_reason(report.unreadable)))
    if report.damage:
        lines = [(f"{bad.path}: frames {spans(bad.frames)}", f"{bad.episode}, {bad.view}") for bad in report.damage]
        console.print(_lines("damaged frames, which cost the clips that show them", "episode, view", lines))
    layout = report.proposed_embodiment or report.embodiment
    if layout is not None:
        block = write_yaml(layout).rstrip().replace("\n", "\n  ")
        guessed = ", guessed from its names and numbers: check it, then" if report.proposed_embodiment else ";"
        console.print(Text(f"\nthe robot's layout{guessed} copy it into the source's config:", style="bold"))
        for reason in report.proposal_reasons:
            console.print(Text(f"  - {reason}"), soft_wrap=True)
        console.print(Text(f"\nembodiment:\n  {block}\n"), soft_wrap=True)


def _summary(report: Report) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows: dict[str, Any] = {
        "format": f"{report.format} (kind: {report.kind})",
        "episodes": f"{report.num_episodes}, all readable"
        if not report.unreadable
        else f"{report.num_episodes}, {len(report.unreadable)} of them cannot be read",
        "frames": f"{report.num_frames} ({_duration(report.duration_s)})",
        "actions": _actions(report),
        "proprio": f"{report.proprio_dim} values" if report.proprio_dim else "none",
        "instructions": _instructions(report),
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def _actions(report: Report) -> str:
    if report.embodiment:
        return (
            f"{report.action_dim} values at {f'{report.control_hz:g} Hz' if report.control_hz else 'an unknown rate'}"
        )
    if report.num_unread_lists:
        return f"none read: choose with settings.action_keys ({report.num_unread_lists} lists found, see note)"
    return "none (action-free video)"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "of unknown duration"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _instructions(report: Report) -> str:
    if not report.instructions:
        return "none"
    shown = "\n".join(f'"{shorten(text, 200, placeholder=" …")}"' for text in report.instructions)
    return f"in {report.num_with_instruction} of {report.num_readable} episodes, for example\n{shown}"


def _view_table(report: Report) -> Table:
    table = Table(title="views", title_justify="left", title_style="bold")
    for name in ("view", "codec", "size", "fps", "files", "frames"):
        table.add_column(name, justify="right" if name in ("files", "frames") else "left", overflow="fold")
    for view, found in report.views.items():
        rates = ", ".join(f"{rate:g}" for rate in found.fps[:4]) + (" …" if len(found.fps) > 4 else "")
        sizes = ", ".join(found.sizes[:4]) + (" …" if len(found.sizes) > 4 else "")
        table.add_row(view, ", ".join(found.codecs), sizes, rates, str(found.num_files), str(found.num_frames))
    return table


def _by_reason(unreadable: list[Unreadable]) -> list[tuple[str, str]]:
    """One line for all episodes whose sentence differs only in its numbers."""
    alike: dict[tuple[str, str], list[Unreadable]] = {}
    for bad in unreadable:
        alike.setdefault((bad.reason, kind_of(bad.detail)), []).append(bad)
    lines = []
    for first, *others in alike.values():
        what = f"{first.detail}\nfirst: {first.episode}, {first.where}" if others else f"{first.where}: {first.detail}"
        who = f"{len(others) + 1} episodes: {first.reason}" if others else f"{first.episode}\n{first.reason}"
        lines.append((what, who))
    return lines


def _lines(title: str, second: str, lines: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False)
    table.add_column("what", overflow="fold", ratio=1)
    table.add_column(second, overflow="fold")
    for sentence, note in lines[:SHOWN_LINES]:
        table.add_row(Text(sentence), Text(note))
    if len(lines) > SHOWN_LINES:
        table.add_row(f"… and {len(lines) - SHOWN_LINES} more (all with --json)", "")
    return table


if __name__ == "__main__":
    run_command(main, DoctorConfig, description=__doc__, positional="path")
