"""docs/data.md: its reader reads, its table names every format, its YAML loads."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.loader import UserError
from data_pipeline.build_config import BuildConfig
from data_pipeline.embodiments import Embodiment
from data_pipeline.loader import LoaderConfig
from data_pipeline.sources import FORMATS, SourceError
from tests.data_pipeline.recordings import numbered_frames, read_numbers

DOC = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC, flags=re.DOTALL)


def test_every_format_is_in_the_table():
    named = re.findall(r"^\| `(\w+)` \|", DOC, flags=re.MULTILINE)
    assert set(named) == set(FORMATS)


def test_the_yaml_loads():
    several, curation, robot, inputs, datasets = (yaml.safe_load(text) for text in snippets("yaml"))
    config = BuildConfig.model_validate(several | curation)
    assert set(config.sources) == {"robot", "bridge", "people"} and config.duplicates.near == 0.03
    assert config.duplicates.semantic is not None and config.duplicates.semantic.min_cosine == 0.97
    assert Embodiment.model_validate(robot["sources"]["arm"]["embodiment"]).action_dim == 7
    loader = LoaderConfig(dataset="runs/mine", **inputs["loader"])
    assert (loader.reads, loader.layout, loader.crop_frames) == ("video", "stack_height", 9)
    assert LoaderConfig(**datasets["loader"]).addresses.keys() == {"web", "lab"}


def test_the_reader_reads(tmp_path):
    (code,) = snippets("python")
    namespace = {"__name__": "picture_log"}
    exec(code, namespace)
    for episode in range(2):
        folder = tmp_path / f"take {episode}"
        (folder / "pictures").mkdir(parents=True)
        for number, frame in enumerate(numbered_frames(range(100 * episode, 100 * episode + 6))):
            Image.fromarray(frame).save(folder / f"pictures/{number:06d}.png")
        np.savetxt(folder / "log.csv", np.arange(24).reshape(6, 4) + 100 * episode, delimiter=",")
    source = namespace["PictureLogSource"](namespace["PictureLogConfig"](path=tmp_path, fps=10))
    first, second = source.list_episodes()
    assert (first[:7], second[:7]) == ("take_0_", "take_1_")
    episode = source.read_episode(second)
    footage = episode.views["main"]
    assert (footage.info().height, footage.info().codec) == (numbered_frames(range(1)).shape[1], "png")
    assert read_numbers(footage.read(footage.positions(np.array([0.0, 0.31]), 10.0))) == [100, 103]
    np.testing.assert_array_equal(episode.actions[1], [106, 107])
    assert episode.actions.dtype == episode.proprio.dtype == np.float32  # as samples hold them, whatever was read
    with pytest.raises(SourceError, match=r"wrong_dims: .*actions have the shape \[6\] instead of \[n d\]"):
        replace(episode, actions=episode.actions[:, 0])
    (tmp_path / "take 0/log.csv").write_text("not numbers")
    with pytest.raises(SourceError, match="unreadable_file"):
        source.read_episode(first)
    (tmp_path / "take 0/log.csv").unlink()
    os.mkfifo(tmp_path / "take 0/log.csv")
    with pytest.raises(SourceError, match="not_a_file"):
        source.read_episode(first)
    with pytest.raises(UserError, match="holds no"):
        namespace["PictureLogSource"](namespace["PictureLogConfig"](path=tmp_path / "x", fps=10)).list_episodes()
