"""The index of latents: their images as a table, and where each one's latent lies.

latents/index.safetensors         the table, shard and row of each image, what the latents are, statistics
latents/shard-00000.safetensors   mu, logvar (n, m, c, h, w): m = 2 where the mirror image was encoded too;
                                  with `encode --no-logvar`, variance (n, m, c), its mean, instead of logvar

A shard stays as it was written. What is encoded later goes to further shards; rows of images that have been removed or
changed are no longer named by the index.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int32
from numpy import ndarray as Array
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.layouts import Mask, Split
from lightdiff.data.table import COLUMN, FINGERPRINT, MANY, ImageTable, check_ranges
from lightdiff.errors import Damaged, RunError, UserError
from lightdiff.run_folder import INDEX
from lightdiff.settings import ImageSettings

# Settings of images that latents do not depend on
NOT_IN_LATENTS = ("data", "data_weights", "labels", "val_share", "max_bad", "max_megapixels", "random_crop")
MAX_ELEMENTS = 1 << 24  # of a latent
LARGEST = 1e30  # float32 holds it, and its product with a latent

Side = Annotated[int, Field(ge=1, le=1 << 16)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Spread = Annotated[float, Field(ge=0, le=LARGEST)]


class Statistics(BaseModel):
    """What `scale` found out about the training split's latents."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    only_mu: bool
    count: int = Field(ge=1)
    mean: Number
    std: Spread
    channel_mean: list[Number]
    channel_std: list[Spread]
    channel_sigma: list[Spread]
    shift: list[Number]
    scale: list[Annotated[float, Field(gt=0, le=LARGEST)]]
    latents: str = ""  # the digest of those that it is about


class ShardFacts(BaseModel):
    """What a shard says of itself."""

    model_config = ConfigDict(extra="forbid")

    vae: str  # digest of the VAE
    plan: str  # digest of the names of its images, and of what their latents depend on besides
    bad: list[tuple[int, str, str]]  # source and name of those that were unreadable, and why


class LatentIndex(ImageTable):
    """What `index.safetensors` holds. Positions count images; the columns are indexed by them."""

    STAGE: ClassVar = "index"

    shape: tuple[Side, Side, Side]  # of a latent: channels, height, width
    dtype: Literal["float16", "bfloat16", "float32"]
    precision: Literal["fp32", "bf16"] = "fp32"
    mirrored: bool
    logvar: bool = True  # whether shards hold it
    vae_digest: str
    images: ImageSettings
    shard_size: int = Field(ge=1)
    shards: list[str] = Field(default_factory=list)  # the digest of each, empty while it is not written
    digest: str = ""
    statistics: Statistics | None = None
    shard: Int32[Array, " n"] = COLUMN  # which one holds, or is to hold, an image; -1: none yet
    row: Int32[Array, " n"] = COLUMN  # the image's row in it; -1: not yet known, or unreadable

    def check(self) -> None:
        """Check that all parts fit together.

        Raises:
            ValueError: If not.
        """
        super().check()
        s, c = self.statistics, self.shape[0]
        lengths = {len(x) for x in (s.channel_mean, s.channel_std, s.channel_sigma)} if s else {c}
        large = math.prod(self.shape) > MAX_ELEMENTS
        scaled = not s or {len(s.shift), len(s.scale)} <= {1, c}
        if {len(self.shard), len(self.row)} != {len(self)} or lengths != {c} or not scaled or large:
            raise ValueError("its parts do not fit together")
        sources = max(1, len(self.images.data))
        check_ranges((self.shard, -1, len(self.shards)), (self.row, -1, MANY), (self.roots, 0, sources))
        written = np.array([*map(bool, self.shards), False])[self.shard]  # the last is shard -1
        if (self.row[~written] >= 0).any() or (self.complete and not written.all()):
            raise ValueError("it names latents that are not written")

    @property
    def depends_on(self) -> dict[str, Any]:
        """What latents depend on besides the images, named as settings are."""
        images = self.images.model_dump(mode="json", exclude=set(NOT_IN_LATENTS))
        return {
            "vae": self.vae_digest[:8],
            "dtype": self.dtype,
            "compute.precision": self.precision,
            "shard_size": self.shard_size,
            "logvar": self.logvar,
            **{f"images.{name}": value for name, value in images.items()},
        }

    def plan(self, positions: NDArray[np.int64]) -> str:
        """A digest of what a shard of the images at these positions is to hold."""
        text = repr([sorted(self.depends_on.items()), list(self.keys(positions))])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """Whether encoding has finished; only then is there a digest."""
        return bool(self.digest)

    @property
    def encoded(self) -> Mask:
        """Which images have a latent, (n,)."""
        found: Mask = self.row >= 0
        return found

    def positions(self, split: Split) -> NDArray[np.int64]:
        """Positions of the images of a split that have a latent."""
        return np.flatnonzero(self.encoded & self.of_split(split))

    def by_shard(self) -> dict[int, NDArray[np.int64]]:
        """Positions of the images that each shard holds or is to hold, unreadable ones included, by its number."""
        order = np.argsort(self.shard, kind="stable")
        numbers, starts = np.unique(self.shard[order], return_index=True)
        parts = zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)
        return {number: part for number, part in parts if number >= 0}

    def classes(self, label: str, values: Sequence[str]) -> Tensor:
        """The number of each image's value of a label, (n,); those without one get the number of values."""
        number = {value: i for i, value in enumerate(values)}
        of_code = [number.get(value, len(values)) for value in self.labels[label]]
        codes = self.codes[list(self.labels).index(label)]
        return torch.from_numpy(np.array([*of_code, len(values)])[codes])  # the last for -1

    def compute_digest(self) -> str:
        """One digest of all latents: of the shards, of which image's latent is where, and of the split."""
        columns = [hashlib.sha256(column.tobytes()).hexdigest() for column in (self.shard, self.row, self.splits)]
        return hashlib.sha256(json.dumps([self.shards, columns]).encode()).hexdigest()

    def forget(self, number: int, mine: NDArray[np.int64]) -> None:
        """Have a shard, of the images at these positions, written again."""
        self.shards[number], self.row[mine] = "", -1

    def take_in(self, number: int, mine: NDArray[np.int64], shard: Checkpoint) -> list[tuple[int, str]]:
        """Note what a shard has: rows and fingerprints; the positions of its unreadable images, with reasons."""
        reasons = {(root, name): why for root, name, why in ShardFacts.model_validate(shard.metadata.extra).bad}
        keys = zip(mine.tolist(), self.keys(mine), strict=True)
        bad = [(position, reasons[key]) for position, key in keys if key in reasons]
        if not self.shards[number]:
            good, found = np.setdiff1d(mine, [p for p, _ in bad]), shard.tensor("fingerprints")
            if len(good) + len(reasons) != len(mine) or found.dtype != torch.uint8:
                raise Damaged(f"{shard.path} is damaged: what it says of its images does not fit")
            self.row[good], self.fingerprints[good] = np.arange(len(good)), found.numpy()
            self.shards[number] = shard.metadata.digest
        return bad


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def open_shard(folder: Path, index: LatentIndex, number: int, mine: NDArray[np.int64]) -> Checkpoint:
    """A shard, checked against the index: it is the one that was written, or it holds what it is to hold.

    `mine` are the positions of its images, as `by_shard` has them.

    Raises:
        UserError: If it is missing, damaged, or another one.
    """
    path = shard_path(folder, number)
    shard = Checkpoint(path, "latents")
    try:
        facts = ShardFacts.model_validate(shard.metadata.extra)
    except ValidationError:
        raise Damaged(f"{path} is damaged: it does not say what it holds") from None
    known, shapes = index.shards[number], shard.shapes("")
    rows = int(index.row[mine].max()) + 1 if known else len(mine) - len(facts.bad)
    n = max([rows, *shapes.get("mu", [])[:1]]) if known else rows  # rows that are no longer named stay
    latent = [n, 1 + index.mirrored, *index.shape]
    spread = {"logvar": latent} if index.logvar else {"variance": latent[:3]}
    wanted = {"mu": latent, **spread, "fingerprints": [n, FINGERPRINT.itemsize]}
    same = known == shard.metadata.digest if known else facts.plan == index.plan(mine)
    if not same or facts.vae != index.vae_digest or shapes != wanted:
        raise Damaged(f"{path} is not the shard of this index, but of another VAE, other settings or other images")
    return shard


def read_logvar(shard: Checkpoint) -> Tensor:
    """A shard's logvar (n, m, c, h, w) or, where it has none, the logarithm of the mean variance at all positions."""
    if "logvar" in shard.names():
        return shard.tensor("logvar")
    return shard.tensor("variance").log()[..., None, None].expand(shard.shapes("")["mu"])


@contextmanager
def repairable() -> Iterator[None]:
    """Say what to do about a shard that cannot be used."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}: run 'lightdiff encode' again, which replaces it") from None


def read_index(folder: Path, finished: bool = False) -> LatentIndex:
    """A folder's index; of finished latents, if so wanted.

    Raises:
        RunError: If it is damaged.
        UserError: If a newer lightdiff wrote it, or encoding has not finished.
    """
    try:
        index = LatentIndex.read(folder / INDEX)
    except Damaged as error:
        raise RunError(f"{error}; run 'lightdiff encode --restart'") from None
    if finished and not index.complete:
        raise UserError(f"{folder}: encoding has not finished: run 'lightdiff encode' again, it resumes")
    return index
