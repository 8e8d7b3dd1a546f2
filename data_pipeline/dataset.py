"""The dataset folder: its file names and the records in them. `build` writes them, every later stage reads them.

<dataset>/
  dataset.yaml            `DatasetInfo`
  shards/<split>/<bucket>/000000.tar (+ .idx)     bucket = <height>x<width>x<num_frames> of the first view
  manifest.parquet        a row per sample, `MANIFEST_SCHEMA`
  rejected.parquet        a row per clip or episode that did not make it, `REJECTED_SCHEMA`
  norm_stats.json         `{"embodiments": {name: {"actions_absolute": …, "actions_relative": …, "proprio": …}},
                            "latents": {"mean": [c], "std": [c], "residual_std": [c]}}`
  codec/  text_encoder/   the frozen encoders (or a reference to them)
  report.html
"""

import importlib.metadata
import json
import math
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field, ValidationError

from configs.loader import StrictConfig, UserError

from .embodiments import Embodiment
from .normalize import NormalizationMode, Normalizer, VectorStats
from .repairs import Repair
from .sample import SCHEMA_VERSION
from .storage import Address
from .video_io import ViewConfig

if TYPE_CHECKING:
    from .encoders import TextEncoder, VideoCodec

DATASET_YAML = "dataset.yaml"
MANIFEST = "manifest.parquet"
REJECTED = "rejected.parquet"
NORM_STATS = "norm_stats.json"
REPORT = "report.html"
CODEC = "codec"
TEXT_ENCODER = "text_encoder"
SHARDS = "shards"

MAX_VALUES = 10**6
"""Of dataset.yaml."""

OPENED = (
    *(DATASET_YAML, NORM_STATS, MANIFEST),
    *(f"{CODEC}/config.json", f"{CODEC}/codec.safetensors", f"{TEXT_ENCODER}/config.json"),
)
"""What is read besides the shards; by file, for few servers list folders. A pretrained codec has no weights here."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

Size = Annotated[int, Field(gt=0, le=2**16)]
"""Of what clips are made of. Tensors are made by it: what is far beyond all data is refused before."""

Rate = Annotated[float, Field(ge=1e-3, le=1e6)]

_NAME = pa.dictionary(pa.int32(), pa.string())

MANIFEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", _NAME),  # relative to the dataset folder
        ("offset", pa.int64()),  # of the sample's tar records
        ("bytes", pa.int64()),
        ("split", _NAME),
        ("bucket", _NAME),
        ("source", _NAME),
        ("episode", _NAME),
        ("embodiment", _NAME),  # null: no robot
        ("has_actions", pa.bool_()),
        ("sha256", pa.string()),  # of the sample's tar records
        ("clip_index", pa.int32()),
        ("start_s", pa.float64()),
        ("motion", pa.float32()),
        ("content_sha256", pa.string()),  # of what the episode was read from
    ]
)

REJECTED_SCHEMA = pa.schema(
    [
        ("where", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("source", pa.string()),
        ("episode", pa.string()),
        ("clip_index", pa.int32()),  # null: the whole episode
    ]
)


class CodecInfo(StrictConfig):
    name: str
    weight_hash: str
    temporal_stride: Size
    spatial_stride: Size
    latent_channels: Size
    psnr: float = Field(description="dB of decoded latents against the stored video, over all pixels.")
    psnr_moving: float | None = Field(description="The same over moving pixels; null where nothing moves.")
    psnr_split: Split = Field(description="The clips they were measured on; train where there are no others.")
    psnr_num_clips: int


class TextEncoderInfo(StrictConfig):
    name: str
    weight_hash: str
    width: Size


class CaptionInfo(StrictConfig):
    """The captions of a dataset: the same, however often they were asked for and whoever has paid."""

    model: str
    captioner: str = Field(description="Digest of the model, the prompt and the settings.")
    clips: int = Field(description="All of them; clips = with_text + captioned + the sum of failed.")
    with_text: int = Field(description="Clips with an instruction, which nobody was asked about.")
    captioned: int
    failed: dict[str, int] = Field(description="Clips that remain without caption, by reason.")
    tokens_in: int
    tokens_out: int
    uncounted: int = Field(description="Answers whose tokens the endpoint did not count.")
    cost: float | None = Field(description="Of all these answers, in the currency of the prices; null without prices.")


class Counts(StrictConfig):
    """found = accepted + rejected. An episode that cannot be cut into clips counts as one."""

    found: int
    accepted: int
    rejected: int
    episodes: int


class SourceInfo(StrictConfig):
    episodes: int
    listing_sha256: str = Field(description="Of the episode ids: tells whether recordings were added or removed.")
    content_sha256: str = Field(description="Of what became of every episode: tells whether anything else changed.")
    repairs: tuple[Repair, ...] = Field((), description="What its reader set right, the most common first.")
    more_repairs: int = Field(0, description="Kinds of repairs beyond those.")


class DatasetInfo(StrictConfig):
    """dataset.yaml."""

    schema_version: int
    code_version: str
    num_frames: Size
    fps: Rate
    actions_per_frame: Size
    control_hz: Rate
    views: dict[str, ViewConfig] = Field(min_length=1)
    embodiments: dict[str, Embodiment]
    codec: CodecInfo
    text_encoder: TextEncoderInfo
    captions: CaptionInfo | None = Field(None, description="null: none were asked for.")
    counts: Counts
    sources: dict[str, SourceInfo]
    build: dict[str, Any] = Field(description="The config that the bytes follow from; a key of BuildConfig each.")


class ControlStats(StrictConfig):
    """Of one robot, over its training clips."""

    actions_absolute: VectorStats
    actions_relative: VectorStats
    proprio: VectorStats | None = Field(description="null: the robot reports none.")


class LatentStatistics(StrictConfig):
    """Per latent channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    residual_std: tuple[float, ...] = Field(min_length=1)


class NormStats(StrictConfig):
    """norm_stats.json."""

    embodiments: dict[str, ControlStats]
    latents: LatentStatistics


def code_version() -> str:
    try:
        return importlib.metadata.version("foresight-wam")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]


def bucket_name(view: ViewConfig, num_frames: int) -> str:
    return f"{view.height}x{view.width}x{num_frames}"


def read_info(dataset: Path, address: Address | None = None) -> DatasetInfo:
    """`address` is where the folder's files are from, which errors tell."""
    path, address = dataset / DATASET_YAML, address or dataset
    where = f"{address}/{DATASET_YAML}"
    try:
        record = yaml.safe_load(_read_text(path))
        if _unfolded_size(record, {}) > MAX_VALUES:
            raise ValueError(f"it unfolds to more than {MAX_VALUES} values")
    except (FileNotFoundError, NotADirectoryError):
        if not dataset.is_dir():
            problem = "is no folder" if dataset.exists() else "no such folder"
            raise UserError(f"{address}: {problem}; give the `out` folder of a finished build.") from None
        raise UserError(
            f"{address}: holds no {DATASET_YAML}, so it is not a dataset; give the `out` folder of a finished build "
            "(`python -m data_pipeline.build --help`)."
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0]}); build the dataset again.") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where}: has schema version {version}, but this code reads {SCHEMA_VERSION}; build the dataset again."
        )
    try:
        return DatasetInfo.model_validate(record)
    except ValidationError as error:
        raise _not_as_written(where, error) from None


def read_table(path: Path, schema: pa.Schema, where: str | None = None) -> pa.Table:
    """The manifest or the rejected clips; of the columns, those of the schema. Errors call it `where`."""
    try:
        _check_is_file(path)
        table = pq.read_table(path, columns=schema.names, memory_map=True).cast(schema)
        table.validate(full=True)  # that text is text, for one: nobody else looks
        return table
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{where or path}: is missing or damaged ({str(error).splitlines()[0]}); build the dataset again."
        ) from None


def read_norm_stats(dataset: Path, address: Address | None = None) -> dict[str, Any]:
    path, where = dataset / NORM_STATS, f"{address or dataset}/{NORM_STATS}"
    try:
        record = json.loads(_read_text(path))
        NormStats.model_validate(record)
    except ValidationError as error:
        raise _not_as_written(where, error) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({error}); restore the file or build the dataset again.") from None
    return record


def _read_text(path: Path) -> str:
    _check_is_file(path)
    return path.read_text(encoding="utf-8")


def _check_is_file(path: Path) -> None:
    """Before it is opened: a pipe would wait for whoever writes into it."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")


def _unfolded_size(value: Any, known: dict[int, float]) -> float:
    """Values in all, those that YAML refers to counted each time: a few lines of references unfold to any size."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # it holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded_size(part, known) for part in parts)
    return known[id(value)]


def _not_as_written(path: str, error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = ": ".join(filter(None, (path, ".".join(map(str, first["loc"])))))
    return UserError(f"{where}: {first['msg']}; restore the file or build the dataset again.")


class DatasetDescription:
    """What a dataset says of all its clips, and several datasets that are read as one of theirs; `str` is where."""

    def __init__(self, info: DatasetInfo, norm_stats: dict[str, Any]) -> None:
        self.info, self.norm_stats = info, norm_stats

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def control_hz(self) -> float:
        return self.info.control_hz

    @property
    def actions_per_latent(self) -> int:
        return self.info.codec.temporal_stride * self.info.actions_per_frame

    @property
    def embodiments(self) -> dict[str, Embodiment]:
        return self.info.embodiments

    @property
    def action_dim(self) -> int:
        """The widest of the embodiments'; narrower ones are padded and masked. 0 without robots."""
        return max((e.action_dim for e in self.embodiments.values()), default=0)

    @property
    def proprio_dim(self) -> int:
        return max((e.proprio_dim for e in self.embodiments.values()), default=0)

    def normalizer(self, embodiment: str, stats: str, mode: NormalizationMode) -> Normalizer | None:
        """`stats` is actions_absolute, actions_relative or proprio; None where the robot reports no proprio."""
        entry = self._stats_of(embodiment)[stats]
        return None if entry is None else Normalizer(entry, mode)

    def _stats_of(self, embodiment: str) -> dict[str, Any]:
        per_embodiment = self.norm_stats["embodiments"]
        if embodiment not in per_embodiment:
            known = ", ".join(per_embodiment) or "none"
            raise UserError(f"{self}: has no statistics of embodiment {embodiment!r}; it knows: {known}.")
        return per_embodiment[embodiment]

    @property
    def residual_std(self) -> float:
        """One number for all channels of how far latents stray from the clip's first latent frame."""
        per_channel = np.array(self.norm_stats["latents"]["residual_std"])
        return float(np.sqrt((per_channel**2).mean()))


class DatasetFolder(DatasetDescription):
    """What a dataset says about itself, its samples apart: description, statistics and encoders.

    An export folder of a trained model carries these files too, so it opens like the dataset that it was trained on.
    """

    def __init__(self, path: Path, address: Address | None = None) -> None:
        """`address`, where it is another one, is where the files in the folder are from; sentences tell it."""
        self.path = Path(path)
        self.address = address or self.path
        super().__init__(read_info(self.path, self.address), read_norm_stats(self.path, self.address))
        for robot in self.info.embodiments.values():
            self._check_stats(robot)
        self._check_latent_stats()

    def __str__(self) -> str:
        return str(self.address)

    def _check_stats(self, robot: Embodiment) -> None:
        stats = self._stats_of(robot.name)
        found = tuple(
            0 if stats[what] is None else len(stats[what]["mean"])
            for what in ("actions_absolute", "actions_relative", "proprio")
        )
        if found != (robot.action_dim, robot.action_dim, robot.proprio_dim):
            raise UserError(
                f"{self.address}/{NORM_STATS}: has {found[0]} absolute and {found[1]} relative action and {found[2]} "
                f"proprio values of {robot.name}, but {DATASET_YAML} describes {robot.action_dim} of actions and "
                f"{robot.proprio_dim} of proprio; restore both files."
            )

    def _check_latent_stats(self) -> None:
        channels = self.info.codec.latent_channels
        for name, values in self.norm_stats["latents"].items():
            if len(values) != channels:
                raise UserError(
                    f"{self.address}/{NORM_STATS}: latents.{name} has {len(values)} values, but {DATASET_YAML} says "
                    f"codec.latent_channels={channels}; restore both files."
                )

    @property
    def num_frames(self) -> int:
        return self.info.num_frames

    @property
    def num_actions(self) -> int:
        """k: actions per clip."""
        return (self.num_frames - 1) * self.info.actions_per_frame

    @property
    def views(self) -> dict[str, ViewConfig]:
        return self.info.views

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(t, c, h, w) of the first view."""
        return self.latent_shape_of(next(iter(self.views)))

    def latent_shape_of(self, view: str) -> tuple[int, int, int, int]:
        codec, size = self.info.codec, self.views[self.check_view(view)]
        frames = 1 + (self.num_frames - 1) // codec.temporal_stride
        return (frames, codec.latent_channels, size.height // codec.spatial_stride, size.width // codec.spatial_stride)

    def check_view(self, view: str | None) -> str:
        """The view asked for, or the first where none is."""
        if view is not None and view not in self.views:
            raise UserError(f"view={view}: {self.address} has no such view; choose one of {', '.join(self.views)}.")
        return view or next(iter(self.views))

    def codec(self) -> "VideoCodec":
        from .encoders import load_video_codec  # seconds to import: they bring torch

        codec = load_video_codec(self.path / CODEC)
        if codec.weight_hash != self.info.codec.weight_hash:
            raise UserError(
                f"{self.address}/{CODEC}: is not the codec that this dataset was encoded with (weight hash "
                f"{codec.weight_hash[:12]}, expected {self.info.codec.weight_hash[:12]}); restore it or build again."
            )
        return codec

    def text_encoder(self) -> "TextEncoder":
        from .encoders import load_text_encoder  # as in `codec`

        encoder = load_text_encoder(self.path / TEXT_ENCODER)
        if encoder.weight_hash != self.info.text_encoder.weight_hash:
            raise UserError(
                f"{self.address}/{TEXT_ENCODER}: is not the text encoder that this dataset was encoded with (weight "
                f"hash {encoder.weight_hash[:12]}, expected {self.info.text_encoder.weight_hash[:12]}); restore it "
                "or build again."
            )
        return encoder
