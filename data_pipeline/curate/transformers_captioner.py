"""Captions from a vision-language model in a local folder, by transformers.

Nothing is downloaded or unpickled, and no code that lies beside the weights is run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from configs.loader import UserError

from ..encoders.local_weights import CONFIG_NAME, DTYPES, check_complete, hash_files, read_json
from ..staging import digest
from .captioners import Answer, CaptionConfig, CaptionError, grey_clip, one_line


class TransformersCaptioner:
    """Any image-text-to-text model that transformers knows, from a local folder; one clip at a time, greedily."""

    def __init__(self, config: CaptionConfig, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText  # seconds to import, and only this captioner needs it

        assert config.folder is not None  # the config's validator has seen to it
        folder = config.folder
        self.config = config
        self.folder = folder
        self.processor = load_processor(folder)
        model, info = _or_user_error(
            folder,
            "weights",
            lambda: AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[config.dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            ),
        )
        check_complete(folder, info)
        self.model = _or_user_error(folder, "weights", lambda: model.eval().requires_grad_(False).to(device))

    @staticmethod
    def identity(config: CaptionConfig) -> str:
        """Of what its answers follow from, besides the frames. Reads all of the weights."""
        assert config.folder is not None
        patterns = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
        files = [path for pattern in patterns for path in config.folder.glob(pattern)]
        what = (hash_files(files), config.dtype, config.prompt, config.max_new_tokens)
        return digest("transformers", *what)

    def check(self, height: int, width: int) -> None:
        try:
            self.answer(grey_clip(self.config.frames, height, width))
        except CaptionError as error:
            raise UserError(
                f"captions: {self.folder} cannot caption {self.config.frames} frames of {height}x{width} "
                f"({error.detail}); lower captions.frames, choose another model, or set captions.kind=none."
            ) from None

    def answer(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Answer:
        try:
            return self._answer(frames)
        except Exception as error:  # out of memory, or a processor that does not take these pictures
            raise CaptionError("model_error", one_line(f"{type(error).__name__}: {error}")) from error

    @torch.inference_mode()
    def _answer(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Answer:
        images = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*images, {"type": "text", "text": self.config.prompt}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        num_read = inputs["input_ids"].shape[1]
        written = output[0, num_read:]
        ends = self.model.generation_config.eos_token_id
        has_ended = len(written) > 0 and int(written[-1]) in (ends if isinstance(ends, list) else [ends])
        return Answer(
            text=self.processor.decode(written, skip_special_tokens=True),
            tokens_in=num_read,
            tokens_out=len(written),
            is_cut=not has_ended,
            is_refusal=False,
        )


def load_processor(folder: Path) -> Any:
    """What turns pictures and text into a model's inputs; quick to open, so it also tells whether a folder will do."""
    from transformers import AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{folder} holds no {CONFIG_NAME}: captions.folder is the folder of a vision-language model in Hugging "
            "Face's layout, downloaded before the build."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no .safetensors file: pickled weights are never opened, so download the safetensors "
            "version of the model."
        )
    model_type = read_json(folder / CONFIG_NAME).get("model_type")
    if model_type not in KNOWN:
        raise UserError(
            f"{folder} holds a {model_type} model, which transformers does not know as one that describes images "
            "(code that comes with weights is never run): choose another, or serve it and set captions.kind=endpoint."
        )
    processor = _or_user_error(
        folder,
        "processor",
        lambda: AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{folder} has no chat template: choose the instruction-tuned version of the model.")
    return processor


def _or_user_error(folder: Path, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, RuntimeError and others' own
        hint = "copy the folder again"
        if "orchvision" in str(error):  # of models whose processor also takes videos
            hint = "install the torchvision release that belongs to your torch"
        elif isinstance(error, torch.OutOfMemoryError):
            hint = "choose a smaller model, or serve this one over several GPUs and set captions.kind=endpoint"
        raise UserError(f"{folder}: its {what} cannot be loaded ({one_line(error)}); {hint}.") from error
