"""Captions from a local folder, with a tiny LLaVA of random weights that transformers itself wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from configs.loader import UserError
from data_pipeline.curate.captioners import CaptionConfig, CaptionError
from data_pipeline.curate.captions import CaptionEpisode, CaptionRecord, captions_json, plan_captions
from data_pipeline.curate.transformers_captioner import TransformersCaptioner
from tests.data_pipeline.test_captions import ROW, stage
from tests.data_pipeline.tiny_dataset import VIEW

WORDS = ["<pad>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", "a", "hand", "pushes", "the", "red", "cube", "."]
TEMPLATE = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ASSISTANT"
)


def write_llava(folder: Path) -> Path:
    """28x28 pictures of four patches each; an answer is any of the words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=16),
        text_config=LlamaConfig(
            **size, vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None
        ),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # or the tiny model says the same of every picture
        torch.nn.init.normal_(parameter, std=0.6) if parameter.ndim > 1 else None
    model.generation_config.suppress_tokens = [3]  # nobody describes a picture with a picture
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny-llava")


def config_for(folder, **changes):
    settings = {"frames": 2, "max_new_tokens": 12, "prompt": "a hand", "dtype": "float32"} | changes
    return CaptionConfig(kind="transformers", folder=folder, **settings)


def plan_for(config, root, num_workers=4, gpus=0):
    return plan_captions(config, root, root.parent / "cache", VIEW, num_workers, gpus)


def run(plan):
    CaptionEpisode(plan)(ROW)
    return CaptionRecord.model_validate_json(captions_json(plan.staging, **ROW).read_bytes())


def noise(seed, num_frames=2):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 40, 48, 3), dtype=np.uint8)


def test_answers_are_those_of_the_model(folder):
    captioner = TransformersCaptioner(config_for(folder))
    answer = captioner.answer(noise(0))
    processor = AutoProcessor.from_pretrained(folder)
    prompt = "USER <image> <image> a hand ASSISTANT"
    inputs = processor(text=prompt, images=[Image.fromarray(frame) for frame in noise(0)], return_tensors="pt")
    ids = inputs["input_ids"]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for _ in range(12):  # greedily, without generate()
        with torch.no_grad():
            logits = model(ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)).logits
        logits[..., 3] = float("-inf")
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == 1:
            break
    num_read = inputs["input_ids"].shape[1]
    assert num_read == 1 + 2 * 4 + 3
    assert (answer.tokens_in, answer.tokens_out) == (num_read, ids.shape[1] - num_read)
    assert answer.text == processor.decode(ids[0, num_read:], skip_special_tokens=True)
    assert answer.is_cut == (int(ids[0, -1]) != 1)
    assert len({captioner.answer(noise(seed)).text for seed in range(6)}) > 1  # the pictures matter
    captioner.check(16, 16)


def test_clips_are_captioned_once_and_without_the_weights_after_that(folder, tmp_path):
    stage(tmp_path / "one", [None, "push it", None])
    stage(tmp_path / "two", [None, "push it", None])
    plans = [plan_for(config_for(folder), tmp_path / name) for name in ("one", "two")]
    assert (plans[0].model, plans[0].num_workers, plans[0].threads, plans[0].gpus_each) == ("tiny-llava", 1, 1, 0)
    first = run(plans[0])
    assert [clip.key for clip in first.clips] == ["key001-0000", "key001-0002"]
    assert all(clip.has_answer and clip.tokens_out for clip in first.clips)
    shutil.rmtree(folder)
    second = run(plans[1])
    assert all(clip.is_cached for clip in second.clips)
    assert [clip.caption for clip in second.clips] == [clip.caption for clip in first.clips]


def test_other_weights_are_another_captioner(folder, tmp_path):
    before = plan_for(config_for(folder), tmp_path / "s")
    moved = folder.rename(tmp_path / "elsewhere")
    assert plan_for(config_for(moved), tmp_path / "s").captioner == before.captioner
    (moved / "README.md").write_text("tiny")
    assert plan_for(config_for(moved), tmp_path / "s").captioner == before.captioner
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    assert plan_for(config_for(moved), tmp_path / "s").captioner != before.captioner
    assert plan_for(config_for(moved, dtype="bfloat16"), tmp_path / "s").answers != before.answers


def test_workers_find_a_relative_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_for(config_for(Path("tiny-llava")), tmp_path / "s")
    assert (plan.config.folder, plan.model) == (folder, "tiny-llava")


def test_one_worker_per_gpu(folder, tmp_path):
    plan = plan_for(config_for(folder), tmp_path / "s", gpus=3)
    assert (plan.num_workers, plan.gpus_each, plan.threads) == (3, 1, 1)
    assert plan_for(config_for(folder, concurrency=2), tmp_path / "s").num_workers == 2


def test_a_model_that_fails_every_time_stops_the_build(folder, tmp_path, monkeypatch):
    stage(tmp_path / "s", [None] * 8)
    plan = plan_for(config_for(folder), tmp_path / "s")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory\nleft")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail)
    with pytest.raises(CaptionError, match="model_error: OutOfMemoryError: no memory left"):
        TransformersCaptioner(config_for(folder)).answer(noise(0))
    with pytest.raises(UserError, match=r"cannot caption 2 frames of 16x16 \(OutOfMemoryError.*captions.frames"):
        run(plan)


# --- folders that will not do -------------------------------------------------------------------------------------


def without_config(folder):
    (folder / "config.json").unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def text_model(folder):
    rewrite(folder / "config.json", model_type="llama")


def with_code(folder):
    """The code says so if it is ever run."""
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: ...\n")
    names = ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText")
    rewrite(folder / "config.json", model_type="own", auto_map=dict.fromkeys(names, "modeling_own.Own"))


def with_processor_code(folder):
    (folder / "processing_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: ...\n")
    rewrite(folder / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "processing_own.Own"})


def without_processor(folder):
    for path in folder.glob("*tokenizer*"):
        path.unlink()
    (folder / "processor_config.json").unlink()


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def damaged_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_config, "holds no config.json"),
        (pickled, "pickled weights are never opened"),
        (text_model, "holds a llama model"),
        (with_code, "code that comes with weights is never run"),
        (with_processor_code, "processor cannot be loaded"),
        (without_processor, "processor cannot be loaded"),
        (without_template, "no chat template"),
        (damaged_json, "cannot be read as JSON"),
    ],
)
def test_a_folder_that_will_not_do_is_told_before_the_build(folder, tmp_path, spoil, sentence):
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as stopped:
        plan_for(config_for(folder), tmp_path / "s")
    assert "\n" not in str(stopped.value)
    assert not (folder / "ran").exists()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def missing_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[2:]), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("spoil", "sentence"), [(cut_weights, "cannot be loaded"), (missing_weights, "2 tensors are")])
def test_weights_that_are_damaged(folder, tmp_path, spoil, sentence):
    stage(tmp_path / "s", [None])
    spoil(folder)
    with pytest.raises(UserError, match=sentence):
        run(plan_for(config_for(folder), tmp_path / "s"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        plan_for(config_for(tmp_path / "nothing"), tmp_path / "s")
