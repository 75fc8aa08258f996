"""Distances between two sets of images, from their features: measures of torch-fidelity (extra `eval`)."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightdiff.extras.evidence import COPIES_SHARE
from lightdiff.extras.features import Features

QUARTERS = 4
NEIGHBOURS = 4
CLOSE = 0.01  # a sample is a copy if it lies nearer to a training image than all but this share of held-out images do
ENOUGH = 10  # images for each feature, from which on the covariance is known well enough
CAUTION = "caution"  # in results of `evaluate`
SAYS_NOTHING = "says nothing"  # in its text: about a distance that is none
MIN_IMAGES = 4  # in a set: precision and recall use three neighbours

Found = dict[str, Any]


def frechet(features: Features, a: Tensor, b: Tensor, names: tuple[str, str]) -> Found:
    """Frechet distance (Heusel et al. 2017, arXiv:1706.08500, Eq. 6) and its standard error.

    The error is estimated from quarters of the first set: the spread of a quarter is twice that of the whole set. Of
    fewer than eight images, it is from halves.
    """
    if min(len(a), len(b)) < MIN_IMAGES:
        return {}
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def distance(some: Tensor) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the covariance of few images is singular
            pair = (fid_features_to_statistics(some.double()), whole)
            return float(fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"])

    whole = fid_features_to_statistics(b.double())
    name = features.name_measure(*names)
    count = QUARTERS if len(a) >= 2 * QUARTERS else 2
    parts = [distance(a[i::count]) for i in range(count)]
    return {name: distance(a), f"{name} +-": float(np.std(parts, ddof=1) / count**0.5)}


def caution(width: int, *counts: int) -> Found:
    """What to think of distances between sets of these sizes: nothing, where both are large enough."""
    count, enough = min(counts), ENOUGH * width
    if count >= enough:
        return {}
    what = SAYS_NOTHING if count <= width else "is too high: compare it only with one of as many images"
    return {CAUTION: f"a Frechet distance of {count:,} images and {width:,} features {what}; {enough:,} are enough"}


def kernel(features: Features, a: Tensor, b: Tensor) -> Found:
    """Kernel distance (Binkowski et al. 2018, arXiv:1801.01401, section 4): unbiased for any number of images."""
    if min(len(a), len(b)) < MIN_IMAGES:
        return {}
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(len(a), len(b), 1000)
    found = kid_features_to_metric(
        a, b, kid_subsets=100, kid_subset_size=size if size < min(len(a), len(b)) else max(2, size // 2), verbose=False
    )
    name = features.name_measure("kernel distance", "KID")
    mean, std = (found[f"kernel_inception_distance_{which}"] for which in ("mean", "std"))
    return {name: float(mean), f"{name} +-": float(std)}


def precision_recall(a: Tensor, b: Tensor) -> Found:
    """Precision and recall of samples a against images b (Kynkäänniemi et al. 2019, arXiv:1904.06991)."""
    if min(len(a), len(b)) < MIN_IMAGES:
        return {}
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(a, b, verbose=False)
    return {"precision": float(found["precision"]), "recall": float(found["recall"])}


def nearest_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each of a, the distances to its nearest neighbours in b, nearest first, and their indices, (n, 4) each."""
    parts = [torch.cdist(some, b).topk(min(NEIGHBOURS, len(b)), largest=False) for some in torch.split(a, 1000)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def copies(samples: Tensor, held_out: Tensor) -> Found:
    """Whether samples lie nearer to training images than new photographs do, which would make them copies."""
    limit = float(held_out.quantile(CLOSE))
    return {
        "distance to the nearest training image, median": float(samples.median()),
        "the same for held-out images": float(held_out.median()),
        f"{COPIES_SHARE} than {1 - CLOSE:.0%} of those": float((samples < limit).double().mean()),
    }
