"""What one sample becomes: crops and speeds that keep frames and actions together, views in their layout, and draws
that depend on nothing but the sample's place in the global order."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.loader import UserError
from data_pipeline.align import ClipClock, nearest_frames
from data_pipeline.augment import Augmentation, AugmentConfig
from data_pipeline.clips import ClipConfig, ClipDataset, read_control
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.embodiments import Embodiment
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.model_inputs import InputConfig, ModelInputs
from data_pipeline.sample_order import Cursor
from data_pipeline.video_io import ViewConfig, decode_clip, encode_video
from data_pipeline.view_layout import LATENTS, PIXELS, ViewLayout
from tests.data_pipeline.tiny_dataset import ACTIONS_PER_FRAME, FPS, tiny_codec, tiny_dataset, tiny_sample

NUM_FRAMES = 17
VIEWS = {
    "front": ViewConfig(height=16, width=24),
    "side": ViewConfig(height=16, width=24),
    "wrist": ViewConfig(height=8, width=24),
    "narrow": ViewConfig(height=16, width=16),
}
ROBOT = Embodiment(
    name="arm",
    action_names=("x", "dy", "speed", "gripper"),
    proprio_names=("x",),
    control_hz=FPS * ACTIONS_PER_FRAME,
    delta_actions=(1,),
    velocity_actions=(2,),
    gripper_actions=(3,),
)
ROWS = np.arange((NUM_FRAMES - 1) * ACTIONS_PER_FRAME, dtype=np.float32)


def level(view: int, frame: int) -> int:
    """What colour the frame is: readable after a lossy codec."""
    return 4 + 14 * frame + 4 * view


def frames_and_views(video: torch.Tensor) -> tuple[list[int], set[int]]:
    """Of plain grey video [f h w 3]: each frame's number, and the views that it is from."""
    levels = video.float().mean((1, 2, 3)).round().long() - 3  # give or take one
    return (levels // 14).tolist(), set((levels % 14 // 4).tolist())


def moving_sample(episode, clip, **kwargs):
    """Everything shows the time: frame i has `level` i; row j of x, dy, speed and proprio is j, the gripper j // 3."""
    sample = tiny_sample(episode, clip, **kwargs)
    video = {
        name: encode_video(
            np.stack([np.full((view.height, view.width, 3), level(v, i), np.uint8) for i in range(NUM_FRAMES)]),
            None,
            FPS,
        )
        for v, (name, view) in enumerate(kwargs["views"].items())
    }
    latents = {
        name: tiny_codec().encode(torch.from_numpy(decode_clip(data))[None])[0].to(torch.bfloat16)
        for name, data in video.items()
    }
    has_actions = sample.meta.has_actions
    return replace(
        sample,
        video=video,
        latents=latents,
        actions=np.stack([ROWS, ROWS, ROWS, ROWS // 3], 1) if has_actions else None,
        proprio=ROWS[:, None] if has_actions else None,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "dataset"
    settings = {"robot": ROBOT, "views": VIEWS, "num_frames": NUM_FRAMES, "make_sample": moving_sample}
    return DatasetIndex(tiny_dataset(folder, clips=(3, 4, 3, 2, 4, 3), action_free=(0, 3), **settings))


def loader(index, rank=0, world_size=1, cursor=None, **changes):
    config = LoaderConfig(dataset=index.path, **{"global_batch_size": 4, "normalization": "none", **changes})
    return Loader(Datasets({"": index}), config, rank, world_size, cursor)


def take(iterable, number):
    return list(islice(iterable, number))


def clips(index, **changes):
    return ClipDataset(index, ClipConfig(**{"normalization": "none", **changes}))


# --- crops and speeds ---------------------------------------------------------------------------------------------

SAMPLE = moving_sample(0, 0, robot=ROBOT, views={"front": ViewConfig(height=8, width=8)}, num_frames=NUM_FRAMES)
META, MEMBERS = SAMPLE.meta, SAMPLE.to_members()


@st.composite
def clocks(draw):
    num_frames = draw(st.sampled_from([5, 9, 13]))
    fastest = (NUM_FRAMES - 1) / (num_frames - 1)
    speed = draw(st.one_of(st.just(1.0), st.integers(20, int(64 * fastest)).map(lambda n: n / 64)))
    start = draw(st.integers(0, int(NUM_FRAMES - 1 - (num_frames - 1) * speed + 1e-9)))
    return start, speed, ClipClock(start / FPS, FPS / speed, num_frames, ACTIONS_PER_FRAME)


@settings(max_examples=80)
@given(clocks())
def test_frames_and_actions_stay_together_at_any_start_and_speed(drawn):
    start, speed, clock = drawn
    shown = nearest_frames(clock.frame_times_s, FPS)
    wanted = start + speed * np.arange(clock.num_frames)
    assert np.abs(shown - wanted).max() <= 0.5 + 1e-3 and shown.max() < NUM_FRAMES
    control = read_control(MEMBERS, META, clock, ROBOT)
    x, dy, speeds, gripper = control.actions.T
    rows = ACTIONS_PER_FRAME * start + speed * np.arange(len(x))  # where the actions lie, counted in recorded rows
    np.testing.assert_allclose(x, rows.clip(max=ROWS[-1]), atol=2e-3)
    np.testing.assert_allclose(speeds, x, atol=1e-6)  # velocities stay velocities, however fast the clip runs
    np.testing.assert_array_equal(gripper, (rows + 1e-3).astype(int).clip(max=ROWS[-1]) // 3)  # held: no half commands
    at_frames = wanted[:-1].clip(max=ROWS[-1] / ACTIONS_PER_FRAME)
    np.testing.assert_allclose(x[::ACTIONS_PER_FRAME] / ACTIONS_PER_FRAME, at_frames, atol=2e-3)
    travelled = np.concatenate([[0], np.cumsum(ROWS)])  # deltas lead to where they led
    ends = np.interp(np.append(rows, rows[-1] + speed), np.arange(len(travelled)), travelled)
    np.testing.assert_allclose(dy, np.diff(ends), atol=2e-2)
    np.testing.assert_allclose(control.proprio[0], ACTIONS_PER_FRAME * start)
    assert control.spans == ((0, len(x)),)


@settings(max_examples=40)
@given(clocks(), st.sets(st.integers(0, len(ROWS) - 1)))
def test_actions_that_were_not_recorded_stay_invalid(drawn, missing):
    start, speed, clock = drawn
    valid = np.array([row not in missing for row in range(len(ROWS))])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], valid, [0]])))
    meta = META.model_copy(update={"action_spans": tuple(map(tuple, edges.reshape(-1, 2).tolist()))})
    control = read_control(MEMBERS, meta, clock, ROBOT)
    found = np.zeros(len(control.actions), bool)
    for first, end in control.spans:
        found[first:end] = True
    assert np.isfinite(control.actions).all()
    for number, is_valid in enumerate(found):
        begin = ACTIONS_PER_FRAME * start + number * speed
        touched = range(int(begin + 1e-3), int(np.ceil(begin + speed - 1e-3)))  # by the delta, which is the widest
        if speed == 1:
            assert is_valid == valid[int(begin + 1e-3)]
        elif is_valid:
            assert valid[list(touched)].all()


def test_a_crop_of_stored_latents_is_what_its_frames_encode_to(index):
    stored, encoded = (clips(index, crop_frames=9, reads=reads)[0] for reads in ("latents", "video"))
    assert stored["latents"].shape == (3, 6, 4, 6) and encoded["video"].shape == (9, 16, 24, 3)
    latents = tiny_codec().encode(encoded["video"][None])[0].to(torch.bfloat16).float()
    assert torch.equal(stored["latents"], latents)
    assert torch.equal(stored["actions"], encoded["actions"]) and len(stored["actions"]) == 16
    whole = clips(index)[0]
    assert torch.equal(whole["latents"][:3], stored["latents"]) and torch.equal(
        whole["actions"][:16], stored["actions"]
    )


AUGMENT = {"random_start": True, "speed": [0.5, 1.5]}


def test_drawn_crops_begin_anywhere_and_run_at_any_speed(index):
    batches = take(loader(index, crop_frames=9, reads="video", only_with_actions=True, augment=AUGMENT), 30)
    starts, speeds = [], []
    for batch in batches:
        for video, actions, proprio in zip(batch["video"], batch["actions"], batch["proprio"], strict=True):
            numbers, views = frames_and_views(video)
            rate = float(actions[2, 2] - actions[0, 2]) / 2  # rows per row
            assert views == {0} and proprio.item() == 2 * numbers[0] == actions[0, 0].item()
            np.testing.assert_allclose(numbers, numbers[0] + rate * np.arange(9), atol=0.51)
            starts.append(numbers[0])
            speeds.append(rate)
    assert set(starts) == set(range(12))  # 9 frames span those of 5 and more
    assert 0.5 <= min(speeds) < 0.6 and 1.4 < max(speeds) <= 1.5
    held_out = take(loader(index, crop_frames=9, reads="video", split="validation", augment=AUGMENT), 3)
    assert all(frames_and_views(video)[0] == list(range(9)) for batch in held_out for video in batch["video"])


# --- views --------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    kind = draw(st.sampled_from(["single", "stack_height", "tile"]))
    count = draw(st.integers(1, 7))
    heights = st.sampled_from([8, 12, 20])
    sizes = tuple((draw(heights) if kind == "stack_height" else 8, 12) for _ in range(count))
    return ViewLayout(kind, tuple(f"view{i}" for i in range(count)), sizes)


@settings(max_examples=60)
@given(layouts())
def test_a_picture_holds_every_view_in_pixels_and_latents_alike(layout):
    shown = layout.sizes[: layout.num_views]
    pixels = [torch.full((2, 5, height, width, 3), i + 1) for i, (height, width) in enumerate(shown)]
    latents = [torch.full((2, 2, 6, height // 4, width // 4), i + 1) for i, (height, width) in enumerate(shown)]
    picture, joined = layout.join(pixels, PIXELS), layout.join(latents, LATENTS)
    assert picture.shape == (2, 5, *layout.size, 3)
    assert torch.equal(picture[0, 0, ::4, ::4, 0], joined[0, 0, 0])  # each view in the same place
    for views, whole, axis in ((pixels, picture, PIXELS), (latents, joined, LATENTS)):
        written = torch.full_like(whole, 99)
        layout.write(written, views, axis)
        assert torch.equal(written, whole)
        if layout.kind != "separate":
            with pytest.raises(ValueError, match="its shape is"):
                layout.write(written, [view[:1] for view in views], axis)
    for parts, found in ((pixels, layout.split(picture, PIXELS)), (latents, layout.split(joined, LATENTS))):
        assert all(torch.equal(part, one) for part, one in zip(parts, found, strict=True))


@pytest.mark.parametrize(
    ("layout", "views", "pixels", "order"),
    [
        ("single", ("side",), (16, 24), [[1]]),
        ("stack_height", ("wrist", "front"), (24, 24), [[2], [0]]),
        ("tile", ("side", "front"), (16, 48), [[1, 0]]),
        ("separate", ("front", "side"), (2, 16, 24), None),
    ],
)
@pytest.mark.parametrize("reads", ["latents", "video", "both"])
def test_views_in_a_batch(index, layout, views, pixels, order, reads):
    (batch,) = take(loader(index, layout=layout, views=views, reads=reads), 1)
    inputs = ModelInputs(index, InputConfig(layout=layout, views=views))
    assert batch["view_is_valid"].tolist() == [[True] * inputs.layout.num_views] * 4
    assert ("latents" in batch, "video" in batch) == (reads != "video", reads != "latents")
    if "video" in batch and layout == "separate":
        assert batch["video"].shape == (4, 2, NUM_FRAMES, 16, 24, 3)
        assert [frames_and_views(view)[1] for view in batch["video"][0]] == [{0}, {1}]
    elif "video" in batch:
        assert batch["video"].shape == (4, NUM_FRAMES, *pixels, 3)
        heights = [VIEWS[views[sum(map(len, order[:r]))]].height for r in range(len(order))]
        for row, numbers in zip(batch["video"][0].split(heights, 1), order, strict=True):
            for cell, number in zip(row.chunk(len(numbers), 2), numbers, strict=True):
                assert frames_and_views(cell) == (list(range(NUM_FRAMES)), {number})
    if "latents" in batch:
        assert batch["latents"].dtype == torch.float32
        assert batch["latents"].shape[-4:] == inputs.latent_shape
        assert batch["latents"].shape[:-4] == ((4, 2) if layout == "separate" else (4,))
    if reads == "both" and layout != "separate":  # each view is encoded by itself
        assert torch.equal(inputs.codec().encode(batch["video"]).to(torch.bfloat16).float(), batch["latents"])
        decoded = inputs.codec().decode(batch["latents"])
        assert decoded.shape == batch["video"].shape


def test_one_of_several_views_is_drawn_by_weight(index):
    settings = {"views": ("front", "side"), "reads": "both", "crop_frames": 5}

    def drawn(**changes) -> Counter:
        batches = take(loader(index, **settings, **changes), 50)
        return Counter(view for batch in batches for video in batch["video"] for view in frames_and_views(video)[1])

    equally = drawn()
    assert equally.keys() == {0, 1} and 70 < equally[0] < 130
    by_weight = drawn(augment={"view_weights": {"front": 1, "side": 4}})
    assert 20 < by_weight[0] < 60
    assert drawn(augment={"view_weights": {"side": 1}}) == {1: 200}
    assert drawn(split="validation") == {0: 200}  # nothing is drawn where nothing is learned


def test_a_dropped_view_is_black_in_pixels_and_latents(index):
    settings = {"views": ("front", "wrist"), "layout": "stack_height", "augment": {"view_dropout": {"wrist": 0.3}}}
    black = tiny_codec().encode(torch.zeros(1, NUM_FRAMES, 8, 24, 3, dtype=torch.uint8))[0].to(torch.bfloat16).float()
    dropped = 0
    for batch in take(loader(index, reads="both", **settings), 40):
        assert batch["view_is_valid"][:, 0].all()
        for video, latents, (_, is_valid) in zip(
            batch["video"], batch["latents"], batch["view_is_valid"].tolist(), strict=True
        ):
            assert torch.equal(latents[..., 4:, :], black) == (not is_valid)
            assert bool((video[:, 16:] == 0).all()) == (not is_valid)
            assert frames_and_views(video[:, :16])[1] == {0}
            dropped += not is_valid
    assert 30 < dropped < 66
    assert take(loader(index, reads="both", split="validation", **settings), 1)[0]["view_is_valid"].all()


# --- purity -------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "global_batch_size": 24,
    "views": ("front", "wrist"),
    "layout": "stack_height",
    "reads": "video",
    "crop_frames": 5,
    "augment": {**AUGMENT, "view_dropout": {"front": 0.2, "wrist": 0.5}},
    "mixture": {"by": "embodiment", "weights": {"arm": 3, "none": 1}},
}
ONE_VIEW = {
    "global_batch_size": 24,
    "views": ("side", "front"),
    "crop_frames": 13,
    "augment": {"view_weights": {"front": 1, "side": 2}, "view_dropout": {"front": 0.5}},
}


@pytest.mark.parametrize("settings", [EVERYTHING, ONE_VIEW], ids=["everything", "one view"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (8, 0), (1, 2), (3, 1)])
def test_the_same_tensors_on_any_ranks_and_workers_and_after_a_stop(index, settings, world_size, num_workers):
    expected = take(loader(index, **settings), 6)
    assert not torch.equal(expected[0]["view_is_valid"], expected[1]["view_is_valid"])
    before = loader(index, **settings)
    take(before, 2)
    cursor = Cursor.model_validate_json(before.cursor.model_dump_json())
    ranks = [
        take(loader(index, rank, world_size, cursor, **settings, num_workers=num_workers), 4)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(expected[2:]):
        parts = [rank[step] for rank in ranks]
        assert [key for part in parts for key in part["keys"]] == whole["keys"]
        for name in whole.keys() - {"keys"}:
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name


def test_draws_are_alike_whatever_else_is_drawn(index):
    inputs = ModelInputs(index, InputConfig(views=("front", "wrist"), layout="stack_height", crop_frames=5))

    def starts(**changes):
        augmentation = Augmentation(inputs, AugmentConfig(random_start=True, **changes))
        return [augmentation.draw((0, 3, row), NUM_FRAMES).start for row in range(50)]

    assert starts() == starts(view_dropout={"wrist": 0.5}) and len(set(starts())) > 8
    other_seed = [
        Augmentation(inputs, AugmentConfig(random_start=True)).draw((1, 3, row), NUM_FRAMES).start for row in range(50)
    ]
    assert starts() != other_seed


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_frames": 8}, "and the first for one: choose 5, 9, 13"),
        ({"crop_frames": 21}, "crop_frames=21, but the clips in .* have 17 frames"),
        ({"views": ("front", "front")}, "front is there twice"),
        ({"layout": "tile"}, "it takes at least two views, named in `views`"),
        ({"views": ("front", "wide")}, "view=wide: .* has no such view; choose one of front, side, wrist, narrow"),
        (
            {"views": ("front", "narrow"), "layout": "stack_height"},
            r"stack_height takes views of one width, but these are front 16x24, narrow 16x16 \(height x width\)",
        ),
        ({"views": ("front", "wrist"), "layout": "tile"}, "layout=tile takes views of one size"),
        ({"views": ("front", "wrist"), "layout": "separate"}, "layout=separate takes views of one size"),
        ({"views": ("front", "wrist")}, "layout=single takes views of one size"),
        ({"augment": {"random_start": True}}, "reads=latents takes stored latents, .*; set loader.reads=video"),
        ({"augment": {"speed": [0.5, 1]}, "reads": "both"}, "reads=both takes stored latents"),
        ({"augment": {"speed": [2, 1]}, "reads": "video"}, "the slowest, 2, is above the fastest, 1"),
        (
            {"augment": {"speed": [1, 2]}, "reads": "video", "crop_frames": 13},
            "speed up to 2 takes 13 frames from 25, but .* have 17; set loader.crop_frames to at most 9",
        ),
        ({"augment": {"view_dropout": {"wrist": 0.5}}}, "view_dropout names wrist, which loader.views does not show"),
        ({"augment": {"view_dropout": {"front": 1.5}}}, "less than or equal to 1"),
        ({"views": ("front", "side"), "augment": {"view_weights": {"front": 0}}}, "view_weights are all zero"),
        (
            {"views": ("front", "side"), "layout": "tile", "augment": {"view_weights": {"front": 1}}},
            "layout=tile shows all of them",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(index, changes, message):
    with pytest.raises((UserError, ValidationError), match=message) as raised:
        loader(index, **changes)
    assert isinstance(raised.value, ValidationError) or "\n" not in str(raised.value)
