"""Write a dataset's report.html anew: what was found, what was kept and why the rest was not, and how it looks.

The page is one self-contained file without scripts, and follows from the dataset alone.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image
from pydantic import Field

from configs.loader import StrictConfig, run_command

from .dataset import REJECTED, REJECTED_SCHEMA, REPORT, SPLITS, read_table
from .dataset_index import DatasetIndex
from .one_thread import one_thread
from .sample import Sample
from .shards import ShardError, write_atomic
from .video_io import VideoError, decode_clip

CLIPS_PER_SOURCE = 4
FRAMES_PER_STRIP = 6
MAX_STRIP_HEIGHT = 128
ACTION_CLIPS = 200
EXAMPLES_PER_REASON = 3
BINS = 24
MAX_NAMED_SOURCES = 4


class PreviewConfig(StrictConfig):
    dataset: Path = Field(description="The dataset folder.")


def main(config: PreviewConfig) -> int:
    with one_thread():
        write_report(config.dataset)
    return 0


def write_report(dataset: Path) -> None:
    write_atomic(dataset / REPORT, render(DatasetIndex(dataset)).encode())


def render(index: DatasetIndex) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    clips = index.manifest.select(["split", "source", "episode", "has_actions", "embodiment", "motion", "bytes"])
    rejected = read_table(index.path / REJECTED, REJECTED_SCHEMA).to_pylist()
    columns = {name: np.array(clips[name].to_pylist(), dtype=object) for name in clips.column_names}
    return environment.get_template("report.html.j2").render(
        info=index.info,
        title=_title(list(index.info.sources)),
        clip_s=(index.num_frames - 1) / index.fps,
        hours=len(index) * index.num_frames / index.fps / 3600,
        megabytes=columns["bytes"].sum() / 1e6 if len(index) else 0.0,
        funnel=_funnel(index, rejected),
        sources=_sources(index, columns, rejected),
        histograms=_histograms(columns),
        strips=_strips(index, columns),
        embodiments=_embodiments(index, columns),
        rejected=_rejected(rejected),
        config=yaml.safe_dump(index.info.build, sort_keys=False, allow_unicode=True, width=110),
    )


def _title(sources: Sequence[str]) -> str:
    return ", ".join(sources) if len(sources) <= MAX_NAMED_SOURCES else f"A dataset of {len(sources)} sources"


# --- tables -------------------------------------------------------------------------------------------------------


def _funnel(index: DatasetIndex, rejected: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bars of clips, each with its share of what was found."""
    counts = index.info.counts
    reasons = Counter(row["reason"] for row in rejected).most_common()
    bars = [("found", counts.found, "found")]
    bars += [(reason.replace("_", " "), number, "rejected") for reason, number in reasons]
    bars += [("accepted", counts.accepted, "accepted")]
    bars += [(split, len(index.indices(split)), "split") for split in SPLITS]
    return [
        {"name": name, "number": number, "share": number / max(counts.found, 1), "kind": kind}
        for name, number, kind in bars
    ]


def _sources(
    index: DatasetIndex, columns: dict[str, np.ndarray], rejected: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for name, source in index.info.sources.items():
        is_here = columns["source"] == name
        rows.append(
            {
                "name": name,
                "licence": index.info.build["sources"][name]["licence"],
                "episodes": source.episodes,
                "clips": int(is_here.sum()),
                "validation": int((is_here & (columns["split"] == "validation")).sum()),
                "hours": is_here.sum() * index.num_frames / index.fps / 3600,
                "with_actions": int(columns["has_actions"][is_here].sum()),
                "embodiment": next((e for e in columns["embodiment"][is_here] if e is not None), None),
                "rejected": sum(row["source"] == name for row in rejected),
            }
        )
    return rows


def _rejected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    reasons = Counter(row["reason"] for row in rows).most_common()
    return [
        {
            "reason": reason,
            "number": number,
            "examples": [row for row in rows if row["reason"] == reason][:EXAMPLES_PER_REASON],
        }
        for reason, number in reasons
    ]


# --- histograms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Bars in a 0..100 by 0..1 box, drawn as SVG by the template."""

    title: str
    unit: str
    heights: tuple[float, ...]
    low: float
    high: float

    @property
    def bars(self) -> list[dict[str, float]]:
        width = 100 / len(self.heights)
        return [{"x": i * width, "width": width * 0.9, "height": h} for i, h in enumerate(self.heights)]


def histogram(
    title: str, unit: str, values: np.ndarray, low: float | None = None, high: float | None = None
) -> Histogram:
    values = np.asarray(values, dtype=np.float64)
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    counts, _ = np.histogram(values, bins=BINS, range=(low, max(high, low + 1e-6)))
    return Histogram(title, unit, tuple((counts / max(counts.max(), 1)).round(4).tolist()), low, high)


def _histograms(columns: dict[str, np.ndarray]) -> list[Histogram]:
    if not len(columns["motion"]):
        return []
    episodes = Counter(zip(columns["source"], columns["episode"], strict=True))
    return [
        histogram("Motion", "share of pixels that move", columns["motion"].astype(float), low=0.0),
        histogram("Clips per episode", "clips", np.array(list(episodes.values())), low=0.0),
        histogram("Sample size", "KB", columns["bytes"].astype(float) / 1e3, low=0.0),
    ]


def _embodiments(index: DatasetIndex, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each robot's action dimensions, over an even subset of its training clips."""
    shown = []
    labelled = index.indices("train", only_with_actions=True)
    for name, embodiment in index.embodiments.items():
        mine = labelled[columns["embodiment"][labelled] == name]
        chosen = mine[np.unique(np.linspace(0, len(mine) - 1, ACTION_CLIPS).astype(int))]
        actions = np.concatenate([Sample.from_members(index.read_sample(i)).actions for i in chosen])
        stats = index.norm_stats["embodiments"][name]["actions_absolute"]
        units = embodiment.action_units or ("",) * embodiment.action_dim
        dims = [
            histogram(slot, unit, actions[:, i], stats["min"][i], stats["max"][i])
            for i, (slot, unit) in enumerate(zip(embodiment.action_names, units, strict=True))
        ]
        shown.append({"name": name, "control_hz": index.control_hz, "num_clips": len(mine), "dims": dims})
    return shown


# --- clips --------------------------------------------------------------------------------------------------------


def _strips(index: DatasetIndex, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each source, clips from the stillest to the liveliest."""
    groups = []
    for name in index.info.sources:
        here = np.flatnonzero(columns["source"] == name)
        if not len(here):
            continue
        by_motion = here[np.argsort(columns["motion"][here].astype(float), kind="stable")]
        chosen = by_motion[np.unique(np.linspace(0, len(here) - 1, CLIPS_PER_SOURCE).round().astype(int))]
        groups.append({"source": name, "clips": [_clip(index, int(i)) for i in chosen]})
    return groups


def _clip(index: DatasetIndex, i: int) -> dict[str, Any]:
    members = index.read_sample(i)
    try:
        sample = Sample.from_members(members)
        views = [{"name": view, "image": _strip(decode_clip(mp4))} for view, mp4 in sorted(sample.video.items())]
    except (KeyError, ValueError, VideoError) as error:
        problem = ShardError(f"holds a member that cannot be read ({error})", "damaged_member")
        raise index.bad_sample(i, problem) from error
    return {"key": sample.key, "meta": sample.meta, "split": index.row(i)["split"], "views": views}


def _strip(video: np.ndarray) -> str:
    """Frames of a clip side by side, as the `src` of an image."""
    frames = video[np.linspace(0, len(video) - 1, FRAMES_PER_STRIP).round().astype(int)]  # f h w 3
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    if strip.height > MAX_STRIP_HEIGHT:
        strip = strip.resize((round(strip.width * MAX_STRIP_HEIGHT / strip.height), MAX_STRIP_HEIGHT))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    run_command(main, PreviewConfig, description=__doc__, positional="dataset")
