"""The Fréchet distance between two sets of clips, and what of their latents it looks at."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Squared, as FID and FVD are: |μx - μy|² + tr(Σx + Σy - 2 (Σx Σy)^½), with unbiased covariances.

    Of centred samples X and Y, the eigenvalues of Σx Σy are the squared singular values of X Yᵀ. So the last trace is
    exact with fewer samples than features too, where the covariances are singular and a matrix root is not to be had.
    NaN where a feature is not finite.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance takes two samples at least, not {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    (mean_x, spread_x), (mean_y, spread_y) = _moments(x), _moments(y)
    overlap = np.linalg.svd(spread_x @ spread_y.T, compute_uv=False).sum()
    means = np.square(mean_x - mean_y).sum()
    return float(max(0.0, means + np.square(spread_x).sum() + np.square(spread_y).sum() - 2 * overlap))


def _moments(x: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "n d"]]:
    """Mean, and the samples centred and scaled so that their product with themselves is the covariance."""
    x = x.astype(np.float64)
    mean = x.mean(0)
    return mean, (x - mean) / np.sqrt(len(x) - 1)


def latent_features(latents: Float[Tensor, "t c h w"], context_latent_frames: int) -> Float[np.ndarray, "3*c"]:
    """Of a clip's future, by channel: mean, standard deviation, and root mean square of the change from latent frame to
    latent frame (what moves). Few enough for a covariance of some dozens of clips to mean something."""
    latents = latents.double()
    future = latents[context_latent_frames:]
    changes = future - latents[context_latent_frames - 1 : -1]
    pooled = [future.mean((0, 2, 3)), future.std((0, 2, 3), correction=0), changes.square().mean((0, 2, 3)).sqrt()]
    return torch.cat(pooled).cpu().numpy()
