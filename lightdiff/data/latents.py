"""The latents' cache: mu and logvar of every image, written shard by shard, read lazily; z <-> x0.

latents/index.json                what they are, which image is where, statistics
latents/shard-00000.safetensors   mu, logvar (n, m, c, h, w): m = 2 where the mirror image was encoded too
latents/vae.safetensors           the VAE they came from
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import RunError, UserError
from lightdiff.run_folder import INDEX, atomic_write_text, read_json
from lightdiff.settings import LatentsSettings, Precision

T = TypeVar("T")
SIZE = ("channels", "height", "width")  # fields of LatentsSettings


class Statistics(BaseModel):
    """What `scale` found out about the training split's latents."""

    model_config = ConfigDict(extra="forbid")

    only_mu: bool
    count: int
    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]
    channel_sigma: list[float]
    shift: list[float]
    scale: list[float]


class LatentIndex(BaseModel):
    """What `index.json` holds. Positions count images; `files[i]` is the image at position i."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    shape: tuple[int, int, int]
    dtype: str
    precision: Precision = "fp32"
    mirrored: bool
    vae_digest: str
    images: dict[str, Any]
    shard_size: int
    files: list[tuple[int, str]]
    splits: str
    labels: list[dict[str, str]]
    bad: list[int] = Field(default_factory=list)
    digest: str = ""
    statistics: Statistics | None = None
    checksum: str = ""

    def classes(self, label: str, values: Sequence[str]) -> Tensor:
        """The number of each image's value of a label, (n,); those without one get the number of values."""
        number = {value: i for i, value in enumerate(values)}
        return torch.tensor([number.get(labels.get(label, ""), len(values)) for labels in self.labels])

    @property
    def files_digest(self) -> str:
        """A digest of the list of images with their split and labels, which says whether it is another."""
        return hashlib.sha256(json.dumps([self.files, self.splits, self.labels]).encode()).hexdigest()[:8]

    @property
    def complete(self) -> bool:
        """Whether encoding has finished; only then is there a digest."""
        return bool(self.digest)

    @property
    def shards(self) -> list[range]:
        """The positions of each shard, unreadable images included."""
        positions = range(len(self.files))
        return [positions[first : first + self.shard_size] for first in positions[:: self.shard_size]]

    def shard_paths(self, folder: Path) -> list[Path]:
        """Where the shards lie."""
        return [shard_path(folder, number) for number in range(len(self.shards))]

    def compute_digest(self, shard_digests: list[str]) -> str:
        """One digest of all latents: of the shards' digests, in order."""
        return hashlib.sha256(json.dumps(shard_digests).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Publish it as the folder's index."""
        raw = self.model_dump(mode="json")
        raw["checksum"] = self.checksum = compute_checksum(raw)
        atomic_write_text(folder / INDEX, json.dumps(raw))  # in ASCII: names may not be UTF-8


def compute_checksum(index: Mapping[str, Any]) -> str:
    """A digest of all fields of an index but the one that holds it."""
    text = json.dumps({name: value for name, value in index.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def read_index(folder: Path, finished: bool = False) -> LatentIndex:
    """A folder's index; of finished latents, if so wanted.

    Raises:
        RunError: If it is damaged.
        UserError: If a newer lightdiff wrote it, or encoding has not finished.
    """
    path, raw = folder / INDEX, read_json(folder / INDEX)
    if isinstance(raw.get("format"), int) and raw["format"] > 1:
        raise UserError(f"{path} has format {raw['format']}, written by a newer lightdiff: upgrade this one")
    try:
        index = LatentIndex.model_validate(raw)
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; run 'lightdiff encode --restart'") from None
    if index.checksum != compute_checksum(raw):
        raise RunError(f"{path} is damaged: it does not match its checksum; run 'lightdiff encode --restart'")
    if finished and not index.complete:
        raise UserError(f"{folder}: encoding has not finished: run 'lightdiff encode' again, it resumes")
    return index


@dataclass(frozen=True)
class Scaling:
    """z <-> x0: x0 = (z - shift) * scale, what diffusion calls clean; each a number or one a channel."""

    shift: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]

    @classmethod
    def of(cls, settings: LatentsSettings, device: torch.device | str = "cpu") -> "Scaling":
        """The scaling that a U-Net was trained with, where latents will be."""
        return cls(torch.tensor(settings.shift, device=device), torch.tensor(settings.scale, device=device))

    def to_x0(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents of the VAE -> clean latents of diffusion, of about unit variance."""
        return (z - self._like(self.shift, z)) * self._like(self.scale, z)

    def to_z(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Clean latents of diffusion -> latents that the VAE can decode."""
        return x0 / self._like(self.scale, x0) + self._like(self.shift, x0)

    @staticmethod
    def _like(value: Tensor, z: Tensor) -> Tensor:
        return value.to(z)[:, None, None]


class LatentSet:
    """Finished latents, opened for reading; shards are mapped into memory, not loaded, until `to` is called."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of latents and verify every shard.

        Raises:
            UserError: If encoding has not finished, or a shard is missing or damaged.
        """
        self.folder, self.index = folder, read_index(folder, finished=True)
        shards = [Checkpoint(path, "latents") for path in self.index.shard_paths(folder)]
        if self.index.compute_digest([shard.metadata.digest for shard in shards]) != self.index.digest:
            raise UserError(f"{folder}: the shards are not those of its index: run 'lightdiff encode --restart'")
        self._mu, self._logvar = ([shard.tensor(name) for shard in shards] for name in ("mu", "logvar"))
        bad = set(self.index.bad)
        # The row of each position, counted over all shards, (n,), and the row after each shard's last.
        self._row = torch.tensor([position not in bad for position in range(len(self.index.files))]).cumsum(0) - 1
        self._ends = torch.tensor([len(mu) for mu in self._mu]).cumsum(0)
        splits = [(i, split) for i, split in enumerate(self.index.splits) if i not in bad]
        self.train, self.val = (array("q", (i for i, split in splits if split == which)) for which in "tv")

    @property
    def nbytes(self) -> int:
        """Size of all latents, in bytes."""
        return sum(t.nbytes for t in (*self._mu, *self._logvar))

    def to(self, device: torch.device) -> "LatentSet":
        """Put all latents on a device, as one tensor."""
        self._mu, self._logvar = ([torch.cat([x.to(device) for x in parts])] for parts in (self._mu, self._logvar))
        self._ends = self._ends[-1:]
        return self

    def gather(self, positions: Sequence[int], mirror: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mu and logvar (b, c, h, w), float32, of images at these positions; one copy for each shard they lie in.

        Args:
            positions: Positions in the index.
            mirror: Which of them to take mirrored, (b,) of 0 and 1; none if not given.
        """
        row = self._row[torch.as_tensor(positions)]
        number = torch.bucketize(row, self._ends, right=True)
        side = mirror if mirror is not None and self.index.mirrored else torch.zeros_like(row)
        device = self._mu[0].device
        found = torch.empty(2, len(row), *self.index.shape, device=device)
        for shard in set(number.tolist()):
            chosen = (number == shard).nonzero().flatten()
            row_in_shard = row[chosen] - (self._ends[shard] - len(self._mu[shard]))
            to, rows, sides = (async_copy(index, device) for index in (chosen, row_in_shard, side[chosen]))
            found[0, to] = self._mu[shard][rows, sides].float()
            found[1, to] = self._logvar[shard][rows, sides].float()
        return found[0], found[1]


def async_copy(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way to a GPU nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x


def prefetch(works: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of these returns, in order; the next one is at work in another thread while this one is used."""
    # With helpers of torch's, this thread would take the cores from the network.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # `pairwise` asks for the next before it hands out this one; the last has nothing after it.
        futures = itertools.chain((pool.submit(work) for work in works), [Future[T]()])
        for future, _ in itertools.pairwise(futures):
            yield future.result()


def latents_settings(found: Path | LatentIndex) -> LatentsSettings:
    """What a U-Net must know of latents, found in a folder or by their index.

    Raises:
        UserError: If `scale` has not run.
    """
    index = read_index(found) if isinstance(found, Path) else found
    if index.statistics is None:
        raise UserError(f"{found}: the latents have no scaling factor yet: run 'lightdiff scale' first")
    scaling = index.statistics.model_dump(include={"shift", "scale", "only_mu"})
    labels = label_values(labels for labels, split in zip(index.labels, index.splits, strict=True) if split == "t")
    return LatentsSettings(**dict(zip(SIZE, index.shape, strict=True)), **scaling, labels=labels)


def label_values(labels: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Each label's name with the sorted values it takes, from the labels of each image."""
    pairs = sorted({pair for found in labels for pair in found.items()})
    return {name: tuple(value for _, value in of) for name, of in itertools.groupby(pairs, key=lambda pair: pair[0])}
