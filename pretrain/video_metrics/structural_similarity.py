"""SSIM: how alike two videos look, by local means, contrasts and structure."""

import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import gaussian_filter


def structural_similarity(predicted: UInt8[np.ndarray, "*b f h w 3"], true: UInt8[np.ndarray, "*b f h w 3"]) -> float:
    """Mean SSIM of all frames and colours, at most 1 (Wang et al., 2004): Gaussian windows of 11 pixels, sigma 1.5."""
    sigmas = [0.0] * (true.ndim - 3) + [1.5, 1.5, 0.0]

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigmas, truncate=3.5)

    x, y = predicted.astype(np.float64), true.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    spread = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
    shared = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
    return float(similarity.mean())
