"""Metrics equal their definitions, computed another way; weights are what they are said to be, and never programs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor

from configs.loader import UserError
from pretrain.video_metrics.frechet import frechet_distance, latent_features
from pretrain.video_metrics.i3d import I3d
from pretrain.video_metrics.lpips import BACKBONES, Backbone, Lpips
from pretrain.video_metrics.network_file import read_state_dict
from pretrain.video_metrics.structural_similarity import structural_similarity

ALEXNET, VGG16 = BACKBONES


def pictures(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- Fréchet distance ---------------------------------------------------------------------------------------------


def with_a_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, as FID is usually computed."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(cov_x @ cov_y)
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y - 2 * np.real(root)))


samples = st.tuples(st.integers(0, 10**6), st.integers(2, 6), st.integers(8, 30), st.integers(8, 30))


def drawn(seed: int, width: int, *sizes: int) -> list[np.ndarray]:
    """Samples of normal laws, each with a mean and a covariance of its own."""
    random = np.random.default_rng(seed)
    return [
        random.normal(size=(size, width)) @ random.normal(size=(width, width)) + random.normal(size=width)
        for size in sizes
    ]


@given(samples)
def test_the_distance_is_that_of_matrix_roots(chosen: tuple[int, int, int, int]) -> None:
    x, y = drawn(*chosen)
    assert frechet_distance(x, y) == pytest.approx(with_a_matrix_root(x, y), rel=1e-6, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * x.shape[1])


@given(samples)
def test_with_fewer_samples_than_features_it_is_exact_too(chosen: tuple[int, int, int, int]) -> None:
    """Samples in a plane of a large space are as far from each other as in the plane by itself."""
    x, y = drawn(*chosen)
    width = x.shape[1]
    plane = np.linalg.qr(np.random.default_rng(chosen[0]).normal(size=(400, width)))[0].T
    assert frechet_distance(x @ plane, y @ plane) == pytest.approx(frechet_distance(x, y), rel=1e-6, abs=1e-9)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two samples at least, not 1 and 3"):
        frechet_distance(np.zeros((1, 2)), np.zeros((3, 2)))


def test_what_is_not_finite_has_no_distance() -> None:
    x = np.ones((3, 2))
    assert math.isnan(frechet_distance(x, x * [1, np.nan])) and math.isnan(frechet_distance(x * [np.inf, 1], x))


def test_features_of_latents_tell_brightness_contrast_and_motion_of_the_future() -> None:
    latents = torch.randn(5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    mean, spread, motion = latent_features(latents, 2).reshape(3, 2)
    future = latents[2:].movedim(1, 0).flatten(1).numpy()
    assert mean == pytest.approx(future.mean(1), abs=1e-6) and spread == pytest.approx(future.std(1), abs=1e-6)
    changes = [(latents[i] - latents[i - 1]).square().mean((1, 2)) for i in (2, 3, 4)]  # the first from the context
    assert motion == pytest.approx(torch.stack(changes).mean(0).sqrt().numpy(), abs=1e-6)
    assert latent_features(latents[[2, 2, 2]], 1)[4:] == pytest.approx([0, 0])  # nothing moves


# --- LPIPS --------------------------------------------------------------------------------------------------------

OUTPUTS = {  # convolutions by torchvision's number: stride, padding, and what comes before them; where it is read
    "AlexNet": {0: (4, 2, None), 3: (1, 2, 3), 6: (1, 1, 3), 8: (1, 1, None), 10: (1, 1, None)},
    "VGG16": {i: (1, 1, 2 if i in (5, 10, 17, 24) else None) for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)},
}
READ = {"AlexNet": (0, 3, 6, 8, 10), "VGG16": (2, 7, 14, 21, 28)}


def lpips_of(name: str, backbone: dict[str, Tensor], heads: dict[str, Tensor], x: Tensor, y: Tensor) -> list[float]:
    """By the paper's formula, from the files' tensors, picture by picture."""
    distances = []
    for pair in zip(x, y, strict=True):
        features = []
        for picture in pair:
            now = (picture.permute(2, 0, 1)[None] / 255 * 2 - 1).float()
            now = (now - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
                [0.458, 0.448, 0.450]
            ).view(3, 1, 1)
            read = []
            for number, (stride, padding, pool) in OUTPUTS[name].items():
                now = now if pool is None else F.max_pool2d(now, pool, 2)
                weight, bias = (backbone[f"features.{number}.{what}"] for what in ("weight", "bias"))
                now = F.conv2d(now, weight, bias, stride, padding).relu()
                read += [now[0]] if number in READ[name] else []
            features.append(read)
        total = 0.0
        for place, (a, b) in enumerate(zip(*features, strict=True)):
            a, b = a / (a.pow(2).sum(0) ** 0.5 + 1e-10), b / (b.pow(2).sum(0) ** 0.5 + 1e-10)
            total += (
                torch.einsum("chw,c->hw", (a - b) ** 2, heads[f"lin{place}.model.1.weight"].flatten()).mean().item()
            )
        distances.append(total)
    return distances


def lpips_files(backbone: Backbone, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """As they are published, but with random weights: torchvision's has a classifier too."""
    torch.manual_seed(seed)
    features = {f"features.{name}": value for name, value in backbone.features().state_dict().items()}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(backbone.channels)}
    torch.save({**features, "classifier.1.weight": torch.zeros(2, 2)}, folder / "backbone.pth")
    torch.save(heads, folder / "heads.pth")
    return folder / "backbone.pth", folder / "heads.pth"


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name)
def test_lpips_is_its_formula_on_either_network(backbone: Backbone, tmp_path: Path) -> None:
    files = lpips_files(backbone, tmp_path)
    network = Lpips.load(*files)
    side = backbone.smallest_side
    x, y = pictures(10, side, side + 7, seed=1), pictures(10, side, side + 7, seed=2)  # more than go at once
    y[3] = x[3]
    found = network(x, y)
    assert found[3] == 0 and (found[:3] > 0).all()
    backbone_weights, heads = (torch.load(path, weights_only=True) for path in files)
    assert found.tolist() == pytest.approx(lpips_of(backbone.name, backbone_weights, heads, x, y), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_similar_is_closer_than_dissimilar_and_safetensors_do_as_well(tmp_path: Path) -> None:
    files = lpips_files(VGG16, tmp_path)
    for path in files:
        save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
    network = Lpips.load(*(path.with_suffix(".safetensors") for path in files))
    x = pictures(1, 16, 16)
    near = (0.9 * x.float()).byte()
    assert 0 < network(x, near) < network(x, 255 - x)
    assert torch.equal(network(x, near), Lpips.load(*files)(x, near))


# --- I3D ----------------------------------------------------------------------------------------------------------


def i3d_of(state: dict[str, Tensor], video: Tensor) -> Tensor:
    """Logits of one clip, from the file's tensors: TensorFlow's padding is looked up place by place."""

    def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=1):
            size = x.shape[axis]
            needed = k - s if size % s == 0 else k - size % s
            before, after = (list(x.shape) for _ in range(2))
            before[axis], after[axis] = max(0, needed) // 2, max(0, needed) - max(0, needed) // 2
            x = torch.cat([x.new_zeros(before), x, x.new_zeros(after)], axis)
        return x

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        x = same(x, kernel, stride)
        for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=1):
            x = x.unfold(axis, k, s).amax(-1)
        return x

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, (scale, shift, mean, variance) = state[f"{name}.conv3d.weight"], (
            state[f"{name}.bn.{what}"].view(-1, 1, 1, 1) for what in ("weight", "bias", "running_mean", "running_var")
        )  # fmt: skip
        out = F.conv3d(same(x, tuple(weight.shape[2:]), (stride,) * 3)[None], weight, stride=stride)[0]
        return ((out - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()

    frames = F.interpolate(video.permute(0, 3, 1, 2) / 255.0, size=(224, 224), mode="bilinear", align_corners=False)
    x = unit(frames.permute(1, 0, 2, 3) * 2 - 1, "Conv3d_1a_7x7", 2)
    x = unit(pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1")
    x = pool(unit(x, "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for block in ("3b", "3c", "pool 3", "4b", "4c", "4d", "4e", "4f", "pool 2", "5b", "5c"):
        if block.startswith("pool"):
            x = pool(x, (int(block[-1]),) * 3, (2, 2, 2))
            continue
        name = f"Mixed_{block}"
        branches = [unit(x, f"{name}.b0")]
        branches += [unit(unit(x, f"{name}.b{i}a"), f"{name}.b{i}b") for i in (1, 2)]
        x = torch.cat([*branches, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")])
    pooled = x.unfold(1, 2, 1).mean((-1, 2, 3))
    return (state["logits.conv3d.weight"].flatten(1) @ pooled + state["logits.conv3d.bias"][:, None]).mean(1)


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With batch norms that have seen something, so that none of their numbers is without effect."""
    torch.manual_seed(0)
    network = I3d()
    for name, value in network.state_dict().items():
        if "bn." in name and value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name.endswith(("var", "weight")) else -0.5))
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(network.state_dict(), path)
    return path


def test_i3d_computes_what_its_definition_says(i3d_file: Path) -> None:
    state = torch.load(i3d_file, weights_only=True)
    assert (
        sum(value.numel() for name, value in state.items() if "running" not in name and "num" not in name) == 12_697_264
    )
    network, clip = I3d.load(i3d_file), pictures(10, 18, 25)
    found, expected = network(clip[None])[0], i3d_of(state, clip)
    assert found.shape == (400,)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


# --- files of weights ---------------------------------------------------------------------------------------------


class Program:
    """Its pickle would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_programs_and_damaged_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Program(tmp_path / "ran")}, tmp_path / "program.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    torch.jit.trace(lambda x: x + 1, torch.zeros(1)).save(str(tmp_path / "torchscript.pt"))
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "nested.pt")
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    whole = lpips_files(VGG16, tmp_path)[1].read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:20])
    for name in ("program.pth", "model.pt", "torchscript.pt", "text.pth", "cut.pth", "cut.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: is no state dict \(.*programs, which are not run\)\.$"):
            read_state_dict(tmp_path / name)
    with pytest.raises(UserError, match=r"nested\.pt: holds no tensors by name; give a file of one state dict\.$"):
        read_state_dict(tmp_path / "nested.pt")
    for name in ("missing.pth", "missing.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file or directory"):
            read_state_dict(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(tmp_path: Path, i3d_file: Path) -> None:
    (tmp_path / "alexnet").mkdir()
    alexnet, vgg16 = lpips_files(ALEXNET, tmp_path / "alexnet"), lpips_files(VGG16, tmp_path)
    with pytest.raises(UserError, match=r"heads\.pth: is not the heads of LPIPS for AlexNet \(4 have another shape"):
        Lpips.load(alexnet[0], vgg16[1])
    with pytest.raises(UserError, match=r"heads\.pth: is no AlexNet or VGG16; give a file with its weights"):
        Lpips.load(vgg16[1], vgg16[0])
    deeper = torch.load(vgg16[0], weights_only=True) | {"features.34.bias": torch.zeros(512)}
    torch.save(deeper, tmp_path / "vgg19.pth")
    with pytest.raises(UserError, match=r"vgg19\.pth: is not the VGG16 of torchvision \(1 are not known here"):
        Lpips.load(tmp_path / "vgg19.pth", vgg16[1])
    with pytest.raises(UserError, match=r"backbone\.pth: is not the I3D of FVD, i3d_pretrained_400\.pt \(\d+ of \d+"):
        I3d.load(vgg16[0])


# --- SSIM ---------------------------------------------------------------------------------------------------------


def test_similarity_is_that_of_windows_computed_one_by_one() -> None:
    drawn = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (2, 3, 11, 11, 3), generator=drawn, dtype=torch.uint8).numpy() for _ in range(2))
    axis = np.exp(-((np.arange(-5, 6) / 1.5) ** 2) / 2)
    window = np.outer(axis, axis) / axis.sum() ** 2

    def at(values: np.ndarray, row: int, column: int) -> np.ndarray:
        """Weighted means around a pixel, borders mirrored; of every frame and colour."""
        padded = np.pad(values, [(0, 0), (0, 0), (5, 5), (5, 5), (0, 0)], mode="symmetric")
        return np.einsum("bfhwc,hw->bfc", padded[:, :, row : row + 11, column : column + 11], window)

    total = 0.0
    for row in range(11):
        for column in range(11):
            a, b = x.astype(float), y.astype(float)
            mean_a, mean_b = at(a, row, column), at(b, row, column)
            var_a, var_b = at(a * a, row, column) - mean_a**2, at(b * b, row, column) - mean_b**2
            both = at(a * b, row, column) - mean_a * mean_b
            c1, c2 = 2.55**2, 7.65**2
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            total += float((luminance * (2 * both + c2) / (var_a + var_b + c2)).mean()) / 121
    assert structural_similarity(x, y) == pytest.approx(total)
    assert math.isclose(structural_similarity(x, x), 1.0)
    assert structural_similarity(x, y) < structural_similarity(x, (0.9 * x).astype(np.uint8)) < 1
