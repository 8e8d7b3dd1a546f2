"""Measurements of a clip's pixels: each limit rejects what it is for, and leaves ordinary recordings alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from configs.loader import UserError, load_config
from data_pipeline.curate.filters import RULES, FilterConfig, broken_rule, filter_scores, sharpness
from data_pipeline.curate.filters import view_scores as scores_of_planes
from data_pipeline.curate.letterbox import brightness, crop_letterbox, full_range, picture_box
from data_pipeline.sources import open_source
from data_pipeline.sources.video_folder import VideoFolderConfig
from data_pipeline.video_io import ViewConfig, decode_clip, decode_frames, encode_video, prepare_view
from data_pipeline.video_pixels import rgb_to_planes, split_planes
from tests.data_pipeline.recordings import write_video

LENGTH, SIDE = 17, 64


def picture(seed=0, height=SIDE, width=SIDE):
    """A natural-looking still: strong low frequencies, weak high ones. uint8 [h w 3]."""
    random = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3))
    for size in (4, 8, 16, 32):
        noise = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        layers += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / size
    low, high = layers.min(), layers.max()
    return (40 + 180 * (layers - low) / (high - low)).astype(np.uint8)


def ordinary(seed=0, length=LENGTH):
    """A dark square crosses a still scene."""
    video = np.repeat(picture(seed)[None], length, axis=0)
    for i in range(length):
        video[i, 20:40, 2 * i : 2 * i + 20] = 25 + 3 * (i % 2)
    return video


def blurred(video):
    return np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(3))) for frame in video])


def letterboxed(video, bar=10):
    boxed = video.copy()
    boxed[:, :bar] = boxed[:, -bar:] = 16
    return boxed


def depth(length=LENGTH):
    """Boxes before a wall, the nearer the darker; one of them approaches."""
    video = np.full((length, SIDE, SIDE, 3), 180, dtype=np.uint8)
    video[:, 30:50, 5:25] = 90
    for i in range(length):
        video[i, 10:40, 30:60] = 150 - 2 * i
    return video


def lamp_at_night():
    video = ordinary() // 10
    video[:, 5:15, 5:15] = 200
    return video


def shaken(seed=0):
    return np.stack([picture(100 * seed + i) for i in range(LENGTH)])


BLACK_VIDEO = np.full((LENGTH, SIDE, SIDE, 3), 16, dtype=np.uint8)
NOISY_BLACK = np.random.default_rng(0).integers(0, 22, (LENGTH, SIDE, SIDE, 3), dtype=np.uint8)
GREEN_VIDEO = np.full((LENGTH, SIDE, SIDE, 3), (0, 135, 0), dtype=np.uint8)  # what a decoder makes of no data

FIRES = {
    "resolution_too_low": ({"min_resolution": 96}, ordinary()),
    "black": ({}, NOISY_BLACK),
    "flat": ({}, GREEN_VIDEO),
    "frozen": ({"max_frozen": 0.4}, np.repeat(ordinary(length=9), 2, axis=0)[:LENGTH]),
    "static": ({"max_static": 0.999}, np.repeat(ordinary(length=1), LENGTH, axis=0)),
    "motion_too_low": ({"min_motion": 0.01}, np.repeat(ordinary(length=1), LENGTH, axis=0)),
    "motion_too_high": ({"max_motion": 0.7}, shaken()),
    "blurred": ({"min_sharpness": 20}, blurred(ordinary())),
    "under_exposed": ({"max_dark": 0.8}, lamp_at_night()),
    "over_exposed": ({"max_bright": 0.5}, (ordinary() / 2 + 180).clip(max=255).astype(np.uint8)),
    "letterboxed": ({"max_letterbox": 0.05}, letterboxed(ordinary())),
    "depth_as_grey": ({"max_depth": 0.9}, depth()),
}


def view_scores(video):
    return scores_of_planes(rgb_to_planes(video))


def verdict(video, **limits):
    scores = filter_scores({"front": rgb_to_planes(video)}, {"front": min(video.shape[1:3])})
    broken = broken_rule(scores, FilterConfig(**limits))
    return broken[0] if broken else None


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", FIRES)
def test_a_limit_rejects_what_it_is_for(reason):
    limits, video = FIRES[reason]
    assert verdict(video, **limits) == reason
    assert verdict(decode_clip(encode_video(video, None, 10.0, crf=18)), **limits) == reason  # codecs add noise


@pytest.mark.parametrize("reason", FIRES)
def test_a_limit_leaves_ordinary_clips_alone(reason):
    limits = {**FIRES[reason][0], **({"min_resolution": 48} if reason == "resolution_too_low" else {})}
    assert verdict(ordinary(), **limits) is None
    assert verdict(decode_clip(encode_video(ordinary(), None, 10.0, crf=18)), **limits) is None


def test_every_limit_is_tested():
    assert {*FIRES, "not_aesthetic", "watermarked", "too_much_text"} == {rule.reason for rule in RULES}
    limits = {name for name in FilterConfig.model_fields if name.startswith(("min_", "max_"))}
    assert limits == {rule.limit for rule in RULES}


@pytest.mark.parametrize("reason", sorted(FIRES.keys() - {"black", "flat"}))
def test_by_default_only_pictures_of_nothing_are_rejected(reason):
    assert verdict(FIRES[reason][1]) is None


def test_a_rejection_says_score_and_limit():
    broken = broken_rule({"motion": 0.0004}, FilterConfig(min_motion=0.01))
    assert broken == ("motion_too_low", "motion is 0.0004, min_motion 0.01")
    assert broken_rule({"motion": 0.01}, FilterConfig(min_motion=0.01, max_motion=0.01)) is None


def test_limits_are_checked():
    for bad in ("max_black=2", "min_resolution=0", "min_aesthetic=4", "max_text=0.1", "max_watermark=0.01"):
        with pytest.raises(UserError):
            load_config(FilterConfig, None, [bad])


def test_the_worst_view_counts():
    sizes = {"front": 480, "wrist": 96}
    scores = filter_scores({"front": rgb_to_planes(ordinary()), "wrist": rgb_to_planes(BLACK_VIDEO)}, sizes)
    assert broken_rule(scores, FilterConfig())[0] == "black"
    assert scores["resolution"] == 96 and scores["sharpness"] == 0
    assert scores["static"] < 0.9  # something moves in one view: the clip is not static
    assert scores["motion"] == pytest.approx(view_scores(ordinary())["motion"] / 2, abs=1e-6)


# --- scores -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([(5, 16, 16), (1, 8, 24), (9, 34, 20), (2, 2, 2)]))
def test_scores_of_anything_are_numbers(seed, shape):
    video = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scores = view_scores(video)
    assert all(np.isfinite(value) and value >= 0 for value in scores.values())
    assert all(value <= 1 for name, value in scores.items() if name != "sharpness")


def test_motion_is_the_share_of_moving_pixels():
    video = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    assert view_scores(video)["motion"] == 0
    video[1:, :4] = 14  # 0.11 of [-1, 1]: not yet
    assert view_scores(video)["motion"] == 0
    video[1:, :4] = 17
    assert view_scores(video)["motion"] == 0.5 and view_scores(video)["static"] == 0.5
    video[1:, :4] = (90, 0, 90)  # as dark as before, but of another colour
    video[0] = (0, 70, 0)
    assert view_scores(video)["motion"] == 1.0


def test_shares_of_frames():
    video = ordinary(length=16)
    video[4:8] = 0
    video[12:] = 128
    scores = view_scores(video)
    assert scores["black"] == 0.25 and scores["flat"] == 0.5
    assert scores["frozen"] == pytest.approx(6 / 15)


def test_sharpness_does_not_depend_on_size():
    large = brightness(picture(height=512, width=512)[None])
    scores = [
        sharpness(np.asarray(Image.fromarray(large[0]).resize((side, side), Image.Resampling.BOX))[None])
        for side in (128, 256, 512)
    ]
    assert max(scores) < 1.1 * min(scores)


def test_grey_pictures_are_not_depth():
    random = np.random.default_rng(0)
    grey = np.repeat((brightness(ordinary()) + random.integers(0, 12, (LENGTH, SIDE, SIDE)))[..., None], 3, axis=-1)
    assert 0 < view_scores(grey.astype(np.uint8))["depth"] < 0.5


def test_scores_of_a_large_clip_are_those_of_the_same_clip_made_small():
    """Pixels are counted on a grid, so that a large view costs little more than a small one."""
    video = ordinary()
    large, small = (view_scores(one) for one in (video.repeat(8, axis=1).repeat(8, axis=2), video))
    for name in ("black", "flat", "frozen", "static", "motion", "dark", "bright", "letterbox"):
        assert large[name] == pytest.approx(small[name], abs=0.03), name


def test_a_spot_in_the_dark_is_not_flat():
    """What is looked at must be fine enough to meet it."""
    video = np.zeros((LENGTH, SIDE, SIDE, 3), dtype=np.uint8)
    video[:, 34:40, 35:41] = 90
    assert view_scores(video)["flat"] == 0


def test_brightness_of_planes_is_that_of_rgb():
    rgb = ordinary()
    found = full_range(split_planes(rgb_to_planes(rgb))[0]).astype(int)
    assert np.abs(found - brightness(rgb)).max() <= 2


# --- letterbox ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_the_picture_between_bars(top, bottom, left, right):
    luma = np.full((3, 50, 60), 16, dtype=np.uint8)
    luma[:, top : 50 - bottom, left : 60 - right] = 100
    box = (top, left, 50 - bottom - top, 60 - right - left)
    assert picture_box(luma) == (box if top + bottom + left + right else None)


def test_what_is_no_letterbox():
    assert picture_box(np.full((3, 50, 60), 16, dtype=np.uint8)) is None  # nothing but black
    dark = brightness(ordinary())
    dark[:, :8] = np.random.default_rng(0).integers(0, 24, (LENGTH, 8, SIDE))  # night, not a bar
    assert picture_box(dark) is None


def test_bars_are_cut_off_whole_episodes(tmp_path):
    write_video(tmp_path / "videos/a.mp4", letterboxed(ordinary(length=20), 12), options={"crf": "12"})
    source = open_source(VideoFolderConfig(path=tmp_path / "videos"))
    episode = source.read_episode(source.list_episodes()[0])
    view = ViewConfig(height=20, width=32)
    views, notes = crop_letterbox({"main": view}, episode.views, episode)
    assert views["main"].crop == (12, 0, 40, 64)
    assert notes == ("View main has black bars: the 40x64 picture at row 12, column 0 of the recorded 64x64 is used.",)
    own = view.model_copy(update={"crop": (0, 0, 30, 30)})
    assert crop_letterbox({"main": own}, episode.views, episode) == ({"main": own}, ())
    pixels = prepare_view(episode.views["main"].read(range(5)), views["main"])
    assert pixels.shape == (5, 20, 32, 3) and pixels.min(axis=(0, 2, 3))[[0, -1]].min() > 24


# --- real recordings ----------------------------------------------------------------------------------------------


def clip_of(path, first=0):
    return prepare_view(decode_frames(path, range(first, first + 17)), ViewConfig(height=128, width=128))


def test_ordinary_recordings_pass(shared_data):
    paths = [
        *sorted(shared_data.glob("ctrlworld_droid/droid_subset/videos/*/*/*.mp4"))[:6],
        *sorted(shared_data.glob("*_lerobot_*/**/*0[01][0-9].mp4"))[:4],
        *sorted(shared_data.glob("vpp_mixed/*/videos/**/*.*m*"))[:4],
        shared_data / "human_sam2_sav/03_blocks.mp4",
    ]
    suggested = {"max_static": 0.9999, "max_motion": 0.95, "min_sharpness": 50, "max_dark": 0.8, "max_bright": 0.5}
    for path in paths:
        assert verdict(clip_of(path)) is None, path
        assert verdict(clip_of(path), **suggested, max_depth=0.9) in (None, "static"), path


def test_real_bars_fades_and_repeats(shared_data):
    simulated = next(shared_data.glob("gr00t_pnp_lerobot_v2/*/videos/*/*/episode_000000.mp4"))
    assert verdict(clip_of(simulated), max_letterbox=0.05) == "letterboxed"
    film = shared_data / "cosmos_curate_clips/test_video_30s.mp4"
    assert verdict(clip_of(film, 372)) == "black" and verdict(clip_of(film, 348)) is None
    twice = next(shared_data.glob("g1_real_lerobot_v21_trim/videos/*/*/episode_000001.mp4"))
    assert view_scores(clip_of(twice))["frozen"] >= 0.4  # a camera of half the recording's rate
