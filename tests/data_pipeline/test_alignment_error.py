"""The promise of the whole way from a recording to its samples: everything within half a frame of the clip's clock.

Two cameras at 29.97 and 24 frames/s lose frames and jitter, and each picture says when it was captured; a robot at
15 Hz loses rows and jitters, and each row says when it was recorded.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_pipeline.align import spans_mask
from data_pipeline.curate.episode import CuratePlan, SourcePlan, curate_episode
from data_pipeline.embodiments import Embodiment, RotationSlots
from data_pipeline.rotations import Rotation, decode, encode
from data_pipeline.sample import Sample
from data_pipeline.shards import TarWriter
from data_pipeline.sources import FORMATS, Episode
from data_pipeline.sources.base import VideoSegment
from data_pipeline.staging import Staging
from data_pipeline.video_io import ViewConfig, decode_clip
from tests.data_pipeline.recordings import HEIGHT, WIDTH, numbered_frames, read_numbers

SECONDS = 7
CAMERA_HZ = {"front": 30000 / 1001, "wrist": 24.0}
CONTROL_HZ = 15.0
TICKS = 30_000  # per second: fine enough that the file's timestamps are the capture times
ROBOT = Embodiment(
    name="clock",
    action_names=("time", "switch", "qx", "qy", "qz", "qw", "heading", "passed"),
    proprio_names=("time", "qx", "qy", "qz", "qw"),
    control_hz=CONTROL_HZ,
    gripper_actions=(1,),
    action_rotations=(RotationSlots(slots=(2, 3, 4, 5), format="quaternion_xyzw"),),
    proprio_rotations=(RotationSlots(slots=(1, 2, 3, 4), format="quaternion_xyzw"),),
    wrapping_actions=(6,),
    delta_actions=(7,),
)


def capture_times(rng: np.random.Generator, hz: float, lost_share: float) -> np.ndarray:
    """When frames or rows were captured: jittering by a tenth, single ones lost, once six in a row."""
    count = int(SECONDS * hz)
    times = (np.arange(count) + rng.uniform(-0.1, 0.1, count)) / hz
    is_kept = rng.uniform(size=count) >= lost_share
    if lost_share:
        is_kept[count // 2 : count // 2 + 6] = False
    is_kept[:2] = True
    return np.round(times[is_kept] * TICKS) / TICKS


def write_camera(path: Path, times_s: np.ndarray) -> VideoSegment:
    """Frame i shows the number i; its timestamp is its capture time."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        for rgb, time in zip(numbered_frames(range(len(times_s))), times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = round((time + 1) * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return VideoSegment(str(path), 0.0, len(times_s), None)


def clock_rows(times_s: np.ndarray) -> np.ndarray:
    """Rows that say their time: as a number, a switch, an orientation, a heading, and the time until the next row."""
    turned = encode(Rotation.from_rotvec(np.outer(times_s, [0, 0, 1.0])), "quaternion_xyzw")
    heading = (times_s + np.pi) % (2 * np.pi) - np.pi
    passed = np.diff(np.append(times_s, times_s[-1] + np.median(np.diff(times_s))))
    switch = np.arange(len(times_s)) % 2
    return np.column_stack([times_s, switch, turned, heading, passed]).astype(np.float32)


class Recording:
    """A source of one episode."""

    name = "lab"

    def __init__(self, folder: Path, camera_loss: float, control_loss: float, has_own_times: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.cameras = {name: capture_times(rng, hz, camera_loss) for name, hz in CAMERA_HZ.items()}
        # each camera's clock starts with its first frame
        self.cameras = {name: times - times[0] for name, times in self.cameras.items()}
        views = {name: write_camera(folder / f"{name}.mp4", times) for name, times in self.cameras.items()}
        if has_own_times:
            self.row_times = capture_times(rng, CONTROL_HZ, control_loss) + 0.013
        else:
            self.row_times = np.arange(int(SECONDS * CONTROL_HZ)) / CONTROL_HZ
        rows = clock_rows(self.row_times)
        self.episode = Episode(
            source="lab",
            episode_id="one",
            uri=str(folder),
            views=views,
            fps=(len(self.cameras["front"]) - 1) / self.cameras["front"][-1],
            num_frames=len(self.cameras["front"]),
            actions=rows,
            proprio=rows[:, [0, 2, 3, 4, 5]],
            control_hz=CONTROL_HZ,
            embodiment="clock",
            instruction=None,
            success=None,
            licence=None,
            content_sha256="0" * 64,
            control_times_s=self.row_times if has_own_times else None,
        )

    def read_episode(self, episode_id: str) -> Episode:
        return self.episode


def curate(folder: Path, recording: Recording, fps: float, actions_per_frame: int) -> list[Sample]:
    config = FORMATS["video_folder"].config(path=folder, name="lab")
    plan = CuratePlan(
        staging=folder / "staging",
        run="test",
        sources={"lab": SourcePlan(config=config, embodiment=ROBOT)},
        views={name: ViewConfig(height=HEIGHT, width=WIDTH) for name in CAMERA_HZ},
        num_frames=9,
        fps=fps,
        stride=8,
        actions_per_frame=actions_per_frame,
        crf=18,
    )
    staging = Staging(plan.staging)
    with TarWriter(staging.curated_tar("lab", "one")) as writer:
        record = curate_episode(plan, "lab", recording, "one", writer)  # type: ignore[arg-type]
    assert {one.reason for one in record.rejected} <= {"no_valid_actions"}
    return [Sample.from_members(members) for members in staging.curated_members(record)]


@pytest.mark.parametrize(
    ("camera_loss", "control_loss", "has_own_times"),
    [(0.0, 0.0, False), (0.15, 0.0, False), (0.15, 0.1, True)],
    ids=["steady", "lost_frames", "lost_frames_and_rows"],
)
@pytest.mark.parametrize(("fps", "actions_per_frame"), [(30000 / 1001, 1), (15.0, 1), (10.0, 2)])
def test_nothing_is_further_than_half_a_frame_from_its_time(
    tmp_path: Path, camera_loss: float, control_loss: float, has_own_times: bool, fps: float, actions_per_frame: int
) -> None:
    recording = Recording(tmp_path, camera_loss, control_loss, has_own_times, seed=round(fps))
    samples = curate(tmp_path, recording, fps, actions_per_frame)
    assert len(samples) >= SECONDS * fps / 8 - 4
    for name, hz in CAMERA_HZ.items():
        check_frames(samples, name, recording.cameras[name], 0.5 / hz, fps)
    num_valid = sum(check_rows(sample, 0.5 / CAMERA_HZ["front"], has_own_times) for sample in samples)
    num_rows = sum(len(sample.actions) for sample in samples if sample.actions is not None)
    assert num_valid == num_rows if not has_own_times else 0.75 * num_rows < num_valid < num_rows


def check_frames(samples: list[Sample], view: str, captured_s: np.ndarray, half_frame_s: float, fps: float) -> None:
    wanted = np.concatenate([sample.meta.start_s + np.arange(9) / fps for sample in samples])
    shown = captured_s[[number for sample in samples for number in read_numbers(decode_clip(sample.video[view]))]]
    nearest_s = np.abs(captured_s[None] - wanted[:, None]).min(axis=1)
    error_s = np.abs(shown - wanted)
    is_possible = nearest_s <= half_frame_s
    assert is_possible.mean() > 0.7
    assert error_s[is_possible].max() <= half_frame_s + 2e-6
    np.testing.assert_allclose(error_s, nearest_s, atol=5e-6)  # and where frames are lost, no other is nearer


def check_rows(sample: Sample, half_frame_s: float, has_own_times: bool) -> int:
    """The number of rows that count."""
    assert sample.actions is not None and sample.proprio is not None and sample.meta.control_hz is not None
    times = sample.meta.start_s + np.arange(len(sample.actions)) / sample.meta.control_hz
    is_valid = spans_mask(sample.meta.action_spans, len(times))
    rows, states, times = sample.actions[is_valid], sample.proprio[is_valid], times[is_valid]
    is_last = times > SECONDS - 1.5 / CONTROL_HZ  # held after the last row, which counts for its interval
    said = {
        "actions": rows[:, 0],
        "rotation": times + turned_past(rows[:, 2:6], times),
        "heading": times + (rows[:, 6] - times + np.pi) % (2 * np.pi) - np.pi,
        "proprio": states[:, 0],
        "proprio rotation": times + turned_past(states[:, 1:], times),
    }
    for what, says in said.items():
        assert np.abs(says - times)[~is_last].max(initial=0) <= 1e-3 <= half_frame_s, what
        assert np.abs(says - times).max(initial=0) <= 1.2 / CONTROL_HZ, what
    assert set(np.unique(rows[:, 1])) <= {0.0, 1.0}
    np.testing.assert_allclose(rows[:, 7], 1 / sample.meta.control_hz, atol=1e-4)  # a step passes its own time
    return len(rows)


def turned_past(quaternions: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """How much further about z than `times_s` radians, in radians."""
    if not len(times_s):
        return times_s
    there = Rotation.from_rotvec(np.outer(times_s, [0, 0, 1.0]))
    return (there.inv() * decode(quaternions, "quaternion_xyzw")).as_rotvec()[:, 2]
