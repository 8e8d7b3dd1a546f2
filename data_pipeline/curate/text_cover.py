"""How much of a clip's pictures text covers, and how much of them text that stays: captions, watermarks, logos.

Any text detector by differentiable binarisation (https://arxiv.org/abs/1911.08947) as ONNX, such as PP-OCR's, whose
settings are the defaults. OpenCV runs it; boxes are read off its map here, because OpenCV's own TextDetectionModel_DB
takes no map of the shape [1 1 h w], which is what PP-OCR's have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from pydantic import Field, PositiveFloat

from configs.loader import StrictConfig, UserError

SCORED_FRAMES = 3

STRIDE = 32
"""Of the detectors' coarsest features: sides of their pictures are multiples of it."""

# How boxes are read off the map, as PP-OCR does it:
# https://github.com/PaddlePaddle/PaddleOCR/blob/main/ppocr/postprocess/db_postprocess.py
LIKELY = 0.3
"""Probability from which on a pixel is text."""

MIN_CONFIDENCE = 0.5
"""Smallest mean probability of a box."""

MIN_SIDE = 3
"""Of a box, in pixels of the map."""

GROWTH = 1.6
"""The detectors are trained on shrunk boxes; grown by this many times area over perimeter, they fit again."""


class TextDetectorConfig(StrictConfig):
    """A text detector, and the pictures that it takes."""

    model: Path = Field(description="ONNX file of a DB text detector for pictures of any size, such as PP-OCR's det")
    longest_side: int = Field(
        512, ge=STRIDE, description="side that pictures are scaled to; more finds smaller text, and takes longer"
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="taken off the colours, 0 to 1, in the order blue, green, red"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (0.229, 0.224, 0.225), description="what they are divided by after that"
    )


@lru_cache(maxsize=1)
def open_text_detector(config: TextDetectorConfig) -> "TextDetector":
    """Once per process."""
    return TextDetector(config)


class TextDetector:
    """Raises UserError where the file is missing, broken, or no text detector."""

    def __init__(self, config: TextDetectorConfig) -> None:
        self._config = config
        if not config.model.is_file():
            raise UserError(
                f"{config.model}: no such file; download a text detector as ONNX (for example PP-OCR's det model) and "
                "give its path."
            )
        try:
            # Left to itself, OpenCV reads what this engine cannot with its older one, which broken files can crash.
            self._network = cv2.dnn.readNetFromONNX(str(config.model), cv2.dnn.ENGINE_NEW)
        except cv2.error as error:
            raise UserError(f"{config.model}: is no ONNX model ({_on_one_line(error)}); download it again.") from error
        if self._network.empty():
            raise UserError(f"{config.model}: has layers that OpenCV cannot run; give another text detector.")
        grey = np.full((2 * STRIDE, 3 * STRIDE, 3), 128, dtype=np.uint8)
        if not _are_probabilities(self._run(grey), grey.shape[:2]):
            raise UserError(
                f"{config.model}: is no text detector; it must map a picture [1 3 h w] to probabilities [1 1 h w]."
            )

    def score(self, video: UInt8[np.ndarray, "f h w 3"]) -> dict[str, float]:
        """Shares of the picture, over a few of the frames: `text` is their mean, `watermark` what is text in all."""
        chosen = np.linspace(0, len(video) - 1, min(SCORED_FRAMES, len(video))).round().astype(int)
        masks = np.stack([self.find_text(frame) for frame in video[chosen]])
        return {"text": float(masks.mean()), "watermark": float(masks.all(axis=0).mean())}

    def find_text(self, frame: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "mh mw"]:
        """True where text is, in the frame as it was scaled for the detector."""
        height, width = frame.shape[:2]
        scale = self._config.longest_side / max(height, width)
        rows, columns = (max(1, round(side * scale / STRIDE)) * STRIDE for side in (height, width))
        scaled = Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR)
        return boxes_of(self._run(np.asarray(scaled))[0, 0])

    def _run(self, picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "1 1 h w"]:
        values = (picture[..., ::-1].astype(np.float32) / 255 - self._config.mean) / self._config.std
        try:
            with _one_thread():
                self._network.setInput(np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32))
                return self._network.forward()
        except cv2.error as error:
            height, width = picture.shape[:2]
            raise UserError(
                f"{self._config.model}: cannot be run on a picture of {height}x{width} pixels ({_on_one_line(error)}); "
                "give a text detector for pictures of any size."
            ) from error


def _are_probabilities(found: np.ndarray | None, size: tuple[int, ...]) -> bool:
    """None is what OpenCV gives where a model has no output; NaN is not between anything."""
    return found is not None and found.shape == (1, 1, *size) and bool(found.min() >= 0 and found.max() <= 1)


def boxes_of(probability: Float32[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The area of the boxes around what is likely to be text."""
    mask = np.zeros(probability.shape, dtype=np.uint8)
    likely = (probability > LIKELY).astype(np.uint8)
    contours, _ = cv2.findContours(likely, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < MIN_SIDE or _mean_inside(probability, contour) < MIN_CONFIDENCE:
            continue
        growth = GROWTH * width * height / (width + height)
        box = cv2.boxPoints((centre, (width + growth, height + growth), angle))
        cv2.fillPoly(mask, [box.round().astype(np.int32)], 1)
    return mask.astype(bool)


def _mean_inside(probability: Float32[np.ndarray, "h w"], contour: np.ndarray) -> float:
    left, top, width, height = cv2.boundingRect(contour)
    inside = np.zeros((height, width), dtype=np.uint8)
    cv2.fillPoly(inside, [contour - (left, top)], 1)
    return float(probability[top : top + height, left : left + width][inside > 0].mean())


def _on_one_line(error: cv2.error) -> str:
    return " ".join(error.err.split())


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV on one thread: the same sums on every machine, and other workers have the other cores."""
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)
