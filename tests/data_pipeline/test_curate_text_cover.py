"""Text in pictures, found by a detector that is small enough to be written here: it takes dense strokes for text."""

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from configs.loader import UserError
from data_pipeline.build_config import BuildConfig
from data_pipeline.curate.filters import FilterConfig, broken_rule, filter_scores
from data_pipeline.curate.shots import ShotConfig
from data_pipeline.curate.text_cover import TextDetector, TextDetectorConfig, boxes_of
from data_pipeline.resolve import open_sources, resolve
from data_pipeline.video_io import ViewConfig, decode_clip, encode_video
from data_pipeline.video_pixels import rgb_to_planes
from tests.data_pipeline.recordings import write_video
from tests.data_pipeline.test_curate import curate, plan_for

HEIGHT, WIDTH = 128, 160


def write_model(path, nodes, **constants):
    """`nodes`: (kind, inputs, output, attributes), from `x` [1 3 h w] to `y` [1 1 h w]."""
    graph = helper.make_graph(
        [helper.make_node(kind, inputs.split(), [output], **attributes) for kind, inputs, output, attributes in nodes],
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, "h", "w"])],
        [numpy_helper.from_array(np.asarray(value, dtype=np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def write_detector(path, last="Sigmoid"):
    """Where strokes are dense, shrunk as the maps of DB are: |Laplacian| -> mean around -> least around -> Sigmoid."""
    nodes = [
        ("Conv", "x laplacian", "edges", {"pads": [1] * 4}),
        ("Abs", "edges", "steepness", {}),
        ("Min", "steepness one", "strokes", {}),
        ("AveragePool", "strokes", "density", {"kernel_shape": [13, 13], "pads": [6] * 4, "count_include_pad": 1}),
        ("Sub", "threshold density", "lack", {}),
        ("MaxPool", "lack", "lack_around", {"kernel_shape": [13, 13], "pads": [6] * 4}),
        ("Mul", "lack_around steepest", "logits", {}),
        (last, "logits", "y", {}),
    ]
    laplacian = np.broadcast_to(np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 3, (1, 3, 3, 3))
    return write_model(path, nodes, laplacian=laplacian, one=[1], threshold=[0.25], steepest=[-20])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_detector(tmp_path_factory.mktemp("detector") / "strokes.onnx")
    return TextDetectorConfig(model=path, longest_side=WIDTH)


@pytest.fixture(scope="module")
def detector(config):
    return TextDetector(config)


def scene(length=9):
    """A soft light that wanders, a dark block, a little noise: nothing written."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    video = np.empty((length, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for i in range(length):
        video[i] = (90 + 60 * np.cos((columns - 12 * i) / 40) * np.sin(rows / 30))[..., None]
    video[:, 60:90, 100:150] //= 2
    return video + np.random.default_rng(0).integers(0, 4, video.shape, dtype=np.uint8)


def caption(video, shifts=None):
    """HELLO! written into every frame, as many pixels further down."""
    written = video.copy()
    for frame, shift in zip(written, shifts or [0] * len(video), strict=True):
        for colour, thickness in ((0, 6), (250, 2)):
            cv2.putText(frame, "HELLO!", (14, 48 + shift), cv2.FONT_HERSHEY_SIMPLEX, 1.1, [colour] * 3, thickness)
    return written


AWAY = 64  # pixels down, where the box of the text above ends before the box of this one begins
MOVES = [0, 0, 0, AWAY, AWAY, AWAY, 0, 0, 0]


# --- scores -------------------------------------------------------------------------------------------------------


def test_a_plain_scene_has_no_text(detector):
    assert detector.score(scene()) == {"text": 0.0, "watermark": 0.0}


def test_text_is_found_where_it_is(detector):
    for shift in (0, AWAY):
        written = caption(scene(1), [shift])[0]
        found, drawn = detector.find_text(written), (written != scene(1)[0]).any(axis=-1)
        assert found.shape == drawn.shape and found[drawn].mean() > 0.95
        rows, columns = np.nonzero(drawn)
        box = np.ptp(rows) * np.ptp(columns) / drawn.size
        assert box < found.mean() < 2.5 * box


def test_a_caption_is_text_that_stays(detector):
    scores = detector.score(caption(scene()))
    assert scores["text"] > 0.1 and 0.9 * scores["text"] < scores["watermark"] <= scores["text"]


def test_moving_text_is_no_watermark(detector):
    still = detector.score(caption(scene()))["text"]
    scores = detector.score(caption(scene(), MOVES))
    assert scores["text"] == pytest.approx(still, rel=0.1) and scores["watermark"] == 0


def test_text_of_one_frame_counts_a_third(detector):
    still = detector.score(caption(scene()))["text"]
    scores = detector.score(caption(scene(3), [0, 500, 500]))
    assert scores["text"] == pytest.approx(still / 3, rel=0.1) and scores["watermark"] == 0


def test_boxes_that_overlap_count_once():
    probability = np.zeros((64, 64), dtype=np.float32)
    probability[10:20, 10:50] = probability[24:34, 10:50] = 0.9  # grown, they meet
    assert boxes_of(probability).mean() == pytest.approx(52 * 36 / 64**2, rel=0.05)
    assert boxes_of(np.where(probability > 0, 0.4, 0)).sum() == 0  # likely pixels, but no confident box
    speck = np.zeros((64, 64), dtype=np.float32)
    speck[30:32, 30:40] = 1
    assert boxes_of(speck).sum() == 0


def test_the_share_depends_neither_on_size_nor_on_codec(detector):
    video = caption(scene())
    share = detector.score(video)["text"]
    large = video.repeat(3, axis=1).repeat(3, axis=2)
    assert detector.score(large)["text"] == pytest.approx(share, rel=0.15)
    assert detector.score(decode_clip(encode_video(video, None, 10.0, crf=18)))["text"] == pytest.approx(
        share, rel=0.15
    )
    upright = np.ascontiguousarray(video.swapaxes(1, 2))
    assert detector.score(upright)["text"] == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(("channel", "expected"), [(0, (0 - 0.1) / 0.5), (1, (0.2 - 0.2) / 1), (2, (1 - 0.3) / 2)])
def test_colours_come_as_the_model_was_trained(tmp_path, channel, expected):
    """Blue, green, red, with the mean taken off and divided by the deviation: a model that shows one of them."""
    nodes = [("Conv", "x kernel", "chosen", {}), ("Sigmoid", "chosen", "y", {})]
    path = write_model(tmp_path / "det.onnx", nodes, kernel=np.eye(3)[channel].reshape(1, 3, 1, 1))
    detector = TextDetector(TextDetectorConfig(model=path, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2)))
    shown = detector._run(np.full((32, 64, 3), (255, 51, 0), dtype=np.uint8))
    np.testing.assert_allclose(shown, np.full((1, 1, 32, 64), 1 / (1 + np.exp(-expected))), atol=1e-6)


def test_the_number_of_threads_is_left_alone_and_changes_nothing(config):
    before = cv2.getNumThreads()
    video, found = caption(scene()), []
    try:
        for num_threads in (1, 3):
            cv2.setNumThreads(num_threads)
            found.append(TextDetector(config).score(video))
            assert cv2.getNumThreads() == num_threads
    finally:
        cv2.setNumThreads(before)
    assert found[0] == found[1]


# --- the filter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shifts", "limits", "reason"),
    [
        (None, {"max_text": 0.1}, "too_much_text"),
        (None, {"max_watermark": 0.01}, "watermarked"),
        (None, {"max_text": 0.1, "max_watermark": 0.01}, "watermarked"),
        (None, {"max_text": 0.9, "max_watermark": 0.9}, None),
        (MOVES, {"max_text": 0.1, "max_watermark": 0.01}, "too_much_text"),
        (MOVES, {"max_watermark": 0.01}, None),
    ],
)
def test_limits(config, shifts, limits, reason):
    views = {"plain": rgb_to_planes(scene()), "written": rgb_to_planes(caption(scene(), shifts))}
    scores = filter_scores(views, dict.fromkeys(views, HEIGHT), text=config)
    broken = broken_rule(scores, FilterConfig(text=config, **limits))
    assert (broken and broken[0]) == reason  # the worst view counts


def test_a_clip_with_a_caption_is_rejected(config, tmp_path):
    video = scene(14)
    write_video(tmp_path / "videos/a.mp4", np.concatenate([caption(video[:7]), video[7:]]))
    views = {"main": ViewConfig(height=HEIGHT, width=WIDTH)}
    filters = FilterConfig(text=config, max_watermark=0.01)
    plan = plan_for(
        tmp_path, tmp_path / "videos", "video_folder", views=views, filters=filters, shots=ShotConfig(detect="off")
    )
    record, samples = curate(plan)
    assert record.rejected[0].reason == "watermarked" and "max_watermark 0.01" in record.rejected[0].detail
    assert samples[-1].meta.filter_scores["watermark"] == samples[-1].meta.filter_scores["text"] == 0


def test_without_a_detector_there_is_no_such_score():
    assert not {"text", "watermark"} & filter_scores({"main": rgb_to_planes(scene())}, {"main": HEIGHT}).keys()


# --- files that are no detector -----------------------------------------------------------------------------------


def test_a_missing_detector_stops_the_build_before_its_work(tmp_path):
    write_video(tmp_path / "videos/a.mp4", scene())
    build = BuildConfig(
        sources={"people": {"kind": "video_folder", "path": tmp_path / "videos"}},
        out=tmp_path / "dataset",
        filters={"text": {"model": tmp_path / "det.onnx"}},
    )
    with pytest.raises(UserError, match=r"det\.onnx: no such file; download a text detector"):
        resolve(build, *open_sources(build))


def test_what_is_no_onnx_file(tmp_path):
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q\x00.", bytes(99)):
        (tmp_path / "det.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"det\.onnx: is no ONNX model"):
            TextDetector(TextDetectorConfig(model=tmp_path / "det.onnx"))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("Identity", "is no text detector"),  # no probabilities
        ("GlobalAveragePool", "is no text detector"),  # one number for the whole picture
        ("NoSuchLayer", "has layers that OpenCV cannot run"),
    ],
)
def test_what_is_no_text_detector(tmp_path, last, message):
    path = write_detector(tmp_path / "det.onnx", last)
    with pytest.raises(UserError, match=message) as raised:
        TextDetector(TextDetectorConfig(model=path))
    assert "\n" not in str(raised.value)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_detector_is_refused_or_runs(config, tmp_path, damage):
    content = bytearray(config.model.read_bytes())
    for place, value in damage:
        content[int(place * len(content))] = value
    (tmp_path / "det.onnx").write_bytes(content)
    try:
        scores = TextDetector(TextDetectorConfig(model=tmp_path / "det.onnx", longest_side=64)).score(scene(1))
    except UserError as error:
        assert "det.onnx" in str(error) and "\n" not in str(error)
    else:
        assert all(0 <= share <= 1 for share in scores.values())


def test_a_detector_that_was_cut_off(config, tmp_path):
    content = config.model.read_bytes()
    for length in range(0, len(content), 40):
        (tmp_path / "det.onnx").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"det\.onnx: is no ONNX model"):
            TextDetector(TextDetectorConfig(model=tmp_path / "det.onnx"))
