"""A run's weights as a folder that diffusers opens, with what is ours beside it.

    python -m pretrain.export checkpoint=runs/wan output=wan_world_model

Writes `config.json` and `diffusion_pytorch_model*.safetensors`, which `WanTransformer3DModel.from_pretrained` reads;
`added.safetensors`, the weights that Wan has not; and the small files of an `export/` folder (model.yaml, the dataset's
description, statistics and encoders), as which it can be used too: to evaluate, to fine-tune, to start another run.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.loader import StrictConfig, UserError, load_config, run_command
from data_pipeline.dataset import DATASET_YAML, NORM_STATS
from data_pipeline.dataset_index import DatasetIndex

from .checkpoint import CHECKPOINTS, find_checkpoints, verify_checkpoint
from .checkpoint_files import CheckpointWeights
from .exported import ADDED_WEIGHTS, MODEL_YAML, VIDEO, WEIGHTS, WorldModelConfig, load_model_config
from .run import CONFIG_FILE
from .train import PretrainConfig, encoder_folders
from .wan_folder import STEM, write_wan_config
from .weights import WeightFiles, write_shards

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ExportConfig(StrictConfig):
    """Weights for other tools."""

    checkpoint: Path = Field(description="run folder (its newest checkpoint), a checkpoint, or an export/ folder")
    output: Path = Field(description="folder to write; it must not exist yet")
    weights: Literal["averaged", "latest"] = Field("averaged", description="of a checkpoint: the average, or the last")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the files")
    max_shard_gb: float = Field(10.0, gt=0, le=1e6, description="gigabytes per file")


def main(config: ExportConfig) -> None:
    source = _weights_folder(config.checkpoint)
    model = load_model_config(source, WorldModelConfig)
    files = _weights(source, config.weights == "averaged")
    video = f"{VIDEO}."
    wan = {name.removeprefix(video): shape for name, shape in files.shapes.items() if name.startswith(video)}
    added = {name: shape for name, shape in files.shapes.items() if not name.startswith(video)}
    max_bytes, dtype = int(config.max_shard_gb * 1e9), DTYPES[config.dtype]
    with _whole_folder(config.output) as folder:
        write_wan_config(folder, model.world_model.video)
        paths = write_shards(folder, STEM, wan, lambda name: files.read(video + name), max_bytes, dtype)
        write_shards(folder, Path(ADDED_WEIGHTS).stem, added, files.read, max_bytes, dtype)
        described = [source / name for name in (MODEL_YAML, DATASET_YAML, NORM_STATS)]
        for path in (*described, *encoder_folders(_folder_with_encoders(source))):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.is_file():
                shutil.copy(path, folder / path.name)
    logger.info("wrote %d tensors for diffusers in %d file(s), and %d of ours", len(wan), len(paths), len(added))


def _weights_folder(given: Path) -> Path:
    """The folder that holds model.yaml beside its weights."""
    if (given / MODEL_YAML).is_file():
        found = given
    else:
        checkpoints = find_checkpoints(given / CHECKPOINTS)
        if not checkpoints:
            raise UserError(f"{given}: holds neither {MODEL_YAML} nor {CHECKPOINTS}/; give the folder of a run.")
        found = checkpoints[-1]
    if found.parent.name == CHECKPOINTS:
        verify_checkpoint(found)
    return found


def _weights(source: Path, averaged: bool) -> WeightFiles | CheckpointWeights:
    if source.parent.name != CHECKPOINTS:
        return WeightFiles(source, Path(WEIGHTS).stem)
    return CheckpointWeights(source, averaged)


def _folder_with_encoders(source: Path) -> Path:
    """An export has them; of a checkpoint, which needs none, the dataset that it was trained on."""
    if source.parent.name != CHECKPOINTS:
        return source
    config = load_config(PretrainConfig, source.parent.parent / CONFIG_FILE)
    address = next(iter(config.loader.addresses.values()))
    return DatasetIndex(address, config.loader.storage).path


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` at the end or goes."""
    if folder.exists():
        raise UserError(f"output={folder} exists already; choose another folder, or move it away.")
    partial = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    run_command(main, ExportConfig, description=__doc__)
