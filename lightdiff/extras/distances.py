"""How one set of images differs from another, by features of theirs: measures of torch-fidelity (extra `eval`)."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightdiff.extras.features import Features

QUARTERS = 4
NEIGHBOURS = 4
CLOSE = 0.01  # share of held-out images that lie nearer to a training image than what is called a copy
FEWEST = 4  # images that something can be said of as a set: precision and recall look at three neighbours

Found = dict[str, Any]


def frechet(features: Features, a: Tensor, b: Tensor, names: tuple[str, str]) -> Found:
    """Frechet distance (Heusel et al. 2017, arXiv:1706.08500, Eq. 6), with an error from quarters of the first set.

    A quarter of the images spreads twice as much as all of them.
    """
    if min(len(a), len(b)) < FEWEST:
        return {}
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def distance(some: Tensor) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few images the covariance is singular
            pair = (fid_features_to_statistics(some.double()), whole)
            return float(fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"])

    whole = fid_features_to_statistics(b.double())
    name = features.called(*names)
    quarters = [distance(a[i::QUARTERS]) for i in range(QUARTERS)] if len(a) >= 10 * QUARTERS else []
    error = {f"{name} +-": float(np.std(quarters, ddof=1) / 2)} if quarters else {}
    return {name: distance(a), **error}


def kernel(features: Features, a: Tensor, b: Tensor) -> Found:
    """Kernel distance (Binkowski et al. 2018, arXiv:1801.01401, section 4): unbiased for any number of images."""
    if min(len(a), len(b)) < FEWEST:
        return {}
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(len(a), len(b), 1000)
    found = kid_features_to_metric(
        a, b, kid_subsets=100, kid_subset_size=size if size < min(len(a), len(b)) else max(2, size // 2), verbose=False
    )
    name = features.called("kernel distance", "KID")
    mean, std = (found[f"kernel_inception_distance_{which}"] for which in ("mean", "std"))
    return {name: float(mean), f"{name} +-": float(std)}


def precision_recall(a: Tensor, b: Tensor) -> Found:
    """Share of samples near training images, and the other way (Kynkäänniemi et al. 2019, arXiv:1904.06991)."""
    if min(len(a), len(b)) < FEWEST:
        return {}
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(a, b, verbose=False)
    return {"precision": float(found["precision"]), "recall": float(found["recall"])}


def nearest_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each of a, the distances to the nearest of b, nearest first, and their numbers, (n, 4) each."""
    parts = [torch.cdist(some, b).topk(min(NEIGHBOURS, len(b)), largest=False) for some in torch.split(a, 1000)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def copies(samples: Tensor, held_out: Tensor) -> Found:
    """Whether samples lie nearer to training images than new photographs do, by which they would be copies of them."""
    limit = float(held_out.quantile(CLOSE))
    return {
        "distance to the nearest training image, median": float(samples.median()),
        "the same of images held out": float(held_out.median()),
        f"share of samples nearer than {1 - CLOSE:.0%} of those": float((samples < limit).double().mean()),
    }
