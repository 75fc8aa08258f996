"""The latents' cache: mu and logvar of every image, written shard by shard, read lazily; z <-> x0.

latents/index.json                what they are, which image is where, statistics
latents/shard-00000.safetensors   mu, logvar (n, m, c, h, w): m = 2 where the mirror image was encoded too
latents/vae.safetensors           the VAE they came from
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lightdiff.checkpoint import Checkpoint, atomic_write_text
from lightdiff.data.files import label_values
from lightdiff.errors import RunError, UserError
from lightdiff.run_folder import read_json
from lightdiff.settings import LatentsSettings, Precision


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
    def complete(self) -> bool:
        """Whether encoding has finished; only then is there a digest."""
        return bool(self.digest)

    def seal(self, shard_digests: list[str]) -> str:
        """One digest of all latents: of the shards', in order."""
        return hashlib.sha256(json.dumps(shard_digests).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Publish it as the folder's index."""
        raw = self.model_dump(mode="json")
        raw["checksum"] = self.checksum = checksum_of(raw)
        atomic_write_text(folder / "index.json", json.dumps(raw))  # in ASCII: names may not be UTF-8


def checksum_of(index: dict[str, Any]) -> str:
    """A digest of an index's metadata, but for the field that holds it."""
    text = json.dumps({name: value for name, value in index.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def read_index(folder: Path) -> LatentIndex:
    """A folder's index.

    Raises:
        RunError: If it is damaged.
        UserError: If a newer lightdiff wrote it.
    """
    path = folder / "index.json"
    raw = read_json(path)
    if isinstance(raw.get("format"), int) and raw["format"] > 1:
        raise UserError(f"{path} has format {raw['format']}, written by a newer lightdiff: upgrade this one")
    try:
        index = LatentIndex.model_validate(raw)
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; run 'lightdiff encode --restart'") from None
    if index.checksum != checksum_of(raw):
        raise RunError(f"{path} is damaged: it does not match its checksum; run 'lightdiff encode --restart'")
    return index


@dataclass(frozen=True)
class Scaling:
    """z <-> x0: x0 = (z - shift) * scale, what diffusion calls clean; each a number or one a channel."""

    shift: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]

    @classmethod
    def of(cls, settings: LatentsSettings) -> "Scaling":
        """The scaling that a U-Net was trained with."""
        return cls(torch.tensor(settings.shift), torch.tensor(settings.scale))

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
        self.folder = folder
        self.index = read_index(folder)
        if not self.index.complete:
            raise UserError(f"{folder}: encoding has not finished: run 'lightdiff encode' again, it continues")
        size, count = self.index.shard_size, len(self.index.files)
        self._mu: list[Tensor] = []
        self._logvar: list[Tensor] = []
        digests: list[str] = []
        self._shard = torch.full((count,), -1, dtype=torch.int32)  # where each position lies; -1: nowhere
        self._row = torch.zeros(count, dtype=torch.int32)
        for number in range(-(-count // size)):
            shard = Checkpoint(shard_path(folder, number), "latents")
            positions = torch.tensor(shard.metadata.extra["positions"], dtype=torch.int64)
            self._shard[positions] = number
            self._row[positions] = torch.arange(len(positions), dtype=torch.int32)
            self._mu.append(shard.tensor("mu"))
            self._logvar.append(shard.tensor("logvar"))
            digests.append(shard.metadata.digest)
        if self.index.seal(digests) != self.index.digest:
            raise UserError(f"{folder}: the shards are not those of its index: run 'lightdiff encode --restart'")
        there = self._shard.ge(0).tolist()
        self.train, self.val = (
            array("q", (p for p, split in enumerate(self.index.splits) if split == wanted and there[p]))
            for wanted in "tv"
        )

    @property
    def nbytes(self) -> int:
        """Size of all latents, in bytes."""
        return sum(t.nbytes for t in (*self._mu, *self._logvar))

    def to(self, device: torch.device) -> "LatentSet":
        """Put all latents on a device, as one tensor."""
        starts = torch.tensor([0, *(len(mu) for mu in self._mu)]).cumsum(0).int()
        self._row += starts[self._shard.clamp(min=0)]
        self._shard.clamp_(max=0)
        self._mu, self._logvar = (
            [torch.cat([part.to(device) for part in parts])] for parts in (self._mu, self._logvar)
        )
        return self

    def gather(self, positions: Sequence[int], mirror: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mu and logvar (b, c, h, w), float32, of images at these positions; one copy for each shard they lie in.

        Args:
            positions: Positions in the index.
            mirror: Which of them to take mirrored, (b,) of 0 and 1; none if not given.
        """
        at = torch.as_tensor(positions)
        number, row = self._shard[at], self._row[at].long()
        side = mirror if mirror is not None and self.index.mirrored else torch.zeros_like(row)
        device = self._mu[0].device
        found = torch.empty(2, len(at), *self.index.shape, device=device)
        for shard in set(number.tolist()):
            chosen = (number == shard).nonzero().flatten()
            place, rows, sides = (to_device(index, device) for index in (chosen, row[chosen], side[chosen]))
            found[0, place] = self._mu[shard][rows, sides].float()
            found[1, place] = self._logvar[shard][rows, sides].float()
        return found[0], found[1]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way to a GPU nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x


def latents_settings(folder: Path) -> LatentsSettings:
    """What a U-Net must know of a folder's latents.

    Raises:
        UserError: If `scale` has not run.
    """
    index = read_index(folder)
    if index.statistics is None:
        raise UserError(f"{folder}: the latents have no scaling factor yet: run 'lightdiff scale' first")
    c, h, w = index.shape
    shift, scale = tuple(index.statistics.shift), tuple(index.statistics.scale)
    only_mu = index.statistics.only_mu
    trained_on = (found for found, split in zip(index.labels, index.splits, strict=True) if split == "t")
    labels = label_values(trained_on)
    return LatentsSettings(channels=c, height=h, width=w, shift=shift, scale=scale, only_mu=only_mu, labels=labels)


def read_finished_index(folder: Path) -> LatentIndex:
    """A folder's index, of finished latents.

    Raises:
        RunError: If it is damaged.
        UserError: If encoding has not finished.
    """
    index = read_index(folder)
    if not index.complete:
        raise UserError(f"{folder}: encoding has not finished: run 'lightdiff encode' again, it continues")
    return index
