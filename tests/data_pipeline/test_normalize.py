"""Streaming statistics equal those of the whole, and normalising is invertible on anything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline import normalize
from data_pipeline.normalize import LatentStats, Normalizer, StreamingStats

MODES = ["quantile", "mean_std", "min_max", "none"]
tables = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 60), st.just(3)),
    elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)


def stats_of(rows, pieces=1):
    stats = StreamingStats(rows.shape[1])
    for piece in np.array_split(rows, pieces):
        stats.add(piece)
    return stats.result()


@given(tables, st.integers(1, 5))
def test_streaming_equals_the_whole(rows, pieces):
    found = stats_of(rows, pieces)
    whole = rows.astype(np.float64)
    assert found["count"] == len(rows)
    expected = {"mean": whole.mean(0), "std": whole.std(0), "min": whole.min(0), "max": whole.max(0)}
    expected |= {"q01": np.quantile(whole, 0.01, axis=0), "q99": np.quantile(whole, 0.99, axis=0)}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-3)


def test_many_rows_are_thinned_evenly_and_alike_however_they_come(monkeypatch):
    monkeypatch.setattr(normalize, "MAX_ROWS", 1000)
    rows = np.random.default_rng(0).standard_normal((20_000, 2)).astype(np.float32)
    one, other = stats_of(rows, 1), stats_of(rows, 777)
    assert one["q01"] == other["q01"] and one["q99"] == other["q99"]
    np.testing.assert_allclose(one["q99"], np.quantile(rows, 0.99, axis=0), atol=0.3)


@given(tables, st.sampled_from(MODES))
def test_normalising_is_invertible(rows, mode):
    normalizer = Normalizer(stats_of(rows), mode)
    scaled = normalizer.normalize(rows)
    assert np.isfinite(scaled).all()
    back = normalizer.unnormalize(scaled)
    np.testing.assert_allclose(back, rows, rtol=1e-4, atol=1e-3)
    tensor = torch.from_numpy(rows)
    np.testing.assert_allclose(normalizer.normalize(tensor).numpy(), scaled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(tensor)).numpy(), back, rtol=1e-5, atol=1e-4)


def test_what_the_modes_promise():
    rows = np.random.default_rng(0).uniform(-3, 7, (5000, 4)).astype(np.float32)
    stats = stats_of(rows)
    scaled = {mode: Normalizer(stats, mode).normalize(rows) for mode in MODES}
    np.testing.assert_allclose(scaled["min_max"].min(0), -1, atol=1e-5)
    np.testing.assert_allclose(scaled["min_max"].max(0), 1, atol=1e-5)
    np.testing.assert_allclose(np.quantile(scaled["quantile"], [0.01, 0.99], axis=0), [[-1] * 4, [1] * 4], atol=1e-4)
    np.testing.assert_allclose(scaled["mean_std"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled["mean_std"].std(0), 1, atol=1e-5)
    np.testing.assert_array_equal(scaled["none"], rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_dimension_does_not_blow_up(mode):
    rows = np.tile(np.array([[0.0, 152.3, 1e-7]], np.float32), (100, 1))
    rows[50:, 1] += 1e-5  # float32 rounding noise
    scaled = Normalizer(stats_of(rows), mode).normalize(rows)
    assert np.abs(scaled).max() <= (152.4 if mode == "none" else 1e-3)


def test_a_gripper_that_rarely_closes_keeps_its_range():
    rows = np.zeros((1000, 1), np.float32)
    rows[-3:] = 1
    scaled = Normalizer(stats_of(rows), "quantile").normalize(rows)
    assert (scaled.min(), scaled.max()) == (-1, 1)


def test_latent_statistics():
    torch.manual_seed(0)
    clips = [torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 3.0]).view(2, 1, 1) + 5 for _ in range(50)]
    stats = LatentStats(2)
    for clip in clips:
        stats.add(clip)
    whole = torch.stack(clips).double()
    found = stats.result()
    np.testing.assert_allclose(found["mean"], whole.mean((0, 1, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(found["std"], whole.std((0, 1, 3, 4), correction=0), rtol=1e-6)
    residual = whole[:, 1:] - whole[:, :1]
    np.testing.assert_allclose(found["residual_std"], residual.std((0, 1, 3, 4), correction=0), rtol=1e-6)
