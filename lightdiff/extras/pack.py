"""pack: images, framed and resized once, in shards that are read fast: against slow PNGs, network disks and stores.

A shard is a tar or zip file that holds each image (train/NAME.webp where some are held out) and, beside it, its labels
(NAME.json), as WebDataset has them. The same images and settings make the same bytes, whatever the number of processes.
"""

import hashlib
import io
import json
import posixpath
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import list_images
from lightdiff.data.loading import ImageDataset
from lightdiff.data.survey import note_sizes, with_whites
from lightdiff.data.table import ImageList
from lightdiff.errors import UserError
from lightdiff.run_folder import atomic_write, atomic_write_text, ensure_writable, read_json, remove_temporaries
from lightdiff.runtime.progress import Reporter, console, print_note
from lightdiff.settings import ImageSettings

Kind = Literal["webp", "png", "jpeg"]
Shards = Literal["tar", "zip"]
LOSSLESS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True, "quality": 50, "method": 4},
    "png": {"compress_level": 6},
}
ABOUT, SUMS = "pack.json", "SHA256SUMS"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # when members were changed: the earliest that a zip can say


@dataclass(frozen=True)
class Plan:
    """What is to be packed, and how."""

    out: Path
    dataset: ImageDataset
    files: ImageList
    kind: Kind
    quality: int
    shards: Shards
    shard_size: int

    @cached_property
    def digest(self) -> str:
        """A digest of all that the shards depend on, but for the pixels."""
        images = self.dataset.settings.model_dump(mode="json", exclude={"data", "labels", "max_bad"})
        how = [images, self.kind, self.quality, self.shards, self.shard_size]
        labels = [self.files.table.labels, hashlib.sha256(self.files.table.codes.tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps([how, labels, self.files.table.list_digest()]).encode()).hexdigest()

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.out / f"shard-{number:05d}.{self.shards}"

    def images(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.files)))

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-len(self.files) // self.shard_size)

    @cached_property
    def keeps_suffix(self) -> bool:
        """Whether names need their old suffix, too: there is 1.jpg beside 1.png."""
        table = self.files.table
        stems = {hash((root, posixpath.splitext(name)[0])) for root, name in table.keys(range(len(table)))}
        return len(stems) < len(table)

    def name(self, i: int) -> str:
        """A member's name without its new suffix: in a folder train or val, if some are held out; and of its source."""
        file, table = self.files[i], self.files.table
        split = f"{file.split}/" if table.splits.any() else ""
        source = f"source-{file.root}/" if table.roots.any() else ""
        return split + source + (file.path if self.keeps_suffix else posixpath.splitext(file.path)[0])


def pack(
    images: ImageSettings, out: Path, kind: Kind, quality: int, shards: Shards, shard_size: int, processes: int
) -> Path:
    """Write all shards that are not there yet, and the list of their digests, which is returned.

    Raises:
        UserError: If the folder holds something else, or too many images cannot be read.
    """
    ensure_writable(out)
    remove_temporaries(out)
    files = list_images(images, console)
    images = with_whites(images, files, print_note)
    note_sizes(images, files, print_note)
    dataset = ImageDataset(files, images, seed=0, train=False)
    plan = Plan(out, dataset, files, kind, quality, shards, shard_size)
    done = begin(plan)
    bad = BadFiles(out / "bad-files.txt", len(files), images.max_bad)
    todo = [number for number in range(plan.count) if str(number) not in done]
    total, processes, packed = sum(len(plan.images(n)) for n in todo), min(processes, max(1, len(todo))), 0
    with Reporter("pack", total) as reporter, packing(plan, todo, processes) as shards_written:
        for number, digest, unreadable in shards_written:
            bad.add(files, unreadable)
            done[str(number)] = digest
            write_about(plan, done)
            packed += len(plan.images(number))
            reporter.advance(packed, {})
    lines = [f"{done[str(number)]}  {plan.path(number).name}" for number in range(plan.count)]
    atomic_write_text(out / SUMS, "\n".join(lines) + "\n")
    whole = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    size = sum(plan.path(number).stat().st_size for number in range(plan.count))
    console.print(
        f"{len(files) - bad.count:,} images in {plan.count:,} shard{'s' * (plan.count > 1)} ({size / 1e6:.1f} MB), "
        f"digest {whole[:16]}; {bad.count} unreadable; "
        f"next: lightdiff train-vae --data '{out}/*.{shards}' --resolution {images.resolution} --random-crop 1",
        soft_wrap=True,
    )
    return out / SUMS


def begin(plan: Plan) -> dict[str, str]:
    """The digests of the shards that are there already, by their numbers.

    Raises:
        UserError: If others are there.
    """
    if not (plan.out / ABOUT).is_file():
        if held := next(plan.out.glob("shard-*"), None):
            raise UserError(f"{held} is there already: choose another folder")
        write_about(plan, {})
    about = read_json(plan.out / ABOUT)
    if about.get("plan") != plan.digest:
        raise UserError(f"{plan.out} holds a pack of other images or settings: choose another folder, or remove it")
    done: dict[str, str] = about.get("shards", {})
    return {number: digest for number, digest in done.items() if plan.path(int(number)).is_file()}


def write_about(plan: Plan, done: dict[str, str]) -> None:
    """Note what is done."""
    settings = plan.dataset.settings.model_dump(mode="json", exclude={"data"})
    about = {"plan": plan.digest, "images": settings, "kind": plan.kind, "shards": done}
    atomic_write_text(plan.out / ABOUT, json.dumps(about, indent=1) + "\n")


PLANS: list[Plan] = []  # in a process that packs: the one that it packs by


@contextmanager
def packing(plan: Plan, todo: list[int], processes: int) -> Iterator[Iterable[tuple[int, str, list[tuple[int, str]]]]]:
    """What `write_shard` says of each of these shards, as they are written by so many processes."""
    if processes == 1:
        pack_by(plan)
        yield map(write_shard, todo)
    else:
        with get_context("spawn").Pool(processes, pack_by, (plan,)) as pool:
            yield pool.imap(write_shard, todo)


def pack_by(plan: Plan) -> None:
    """Keep the plan of this process."""
    PLANS[:] = [plan]


def write_shard(number: int) -> tuple[int, str, list[tuple[int, str]]]:
    """Write a shard; its number, its digest, and which images could not be read, and why."""
    torch.set_num_threads(1)
    (plan,) = PLANS
    bad: list[tuple[int, str]] = []
    write = write_tar if plan.shards == "tar" else write_zip
    atomic_write(plan.path(number), lambda temporary: write(temporary, members(plan, number, bad)))
    with open(plan.path(number), "rb") as file:
        return number, hashlib.file_digest(file, "sha256").hexdigest(), bad


def members(plan: Plan, number: int, bad: list[tuple[int, str]]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of a shard's members; `bad` takes the images that cannot be read."""
    for i in plan.images(number):
        item = plan.dataset[0, i]
        bad += item.bad
        if item.x is None:
            continue
        if labels := plan.dataset.files[i].labels:
            yield f"{plan.name(i)}.json", json.dumps(labels, ensure_ascii=False).encode("utf-8", "surrogatepass")
        stream = io.BytesIO()
        how = LOSSLESS.get(plan.kind, {"quality": plan.quality, "subsampling": 0})
        Image.fromarray(item.x.permute(1, 2, 0).numpy()).save(stream, plan.kind, **how)
        yield f"{plan.name(i)}.{plan.kind}", stream.getvalue()


def write_tar(path: Path, content: Iterator[tuple[str, bytes]]) -> None:
    """A tar file without times and owners."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_zip(path: Path, content: Iterator[tuple[str, bytes]]) -> None:
    """A zip file without times, its members stored."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content:
            archive.writestr(zipfile.ZipInfo(name, LONG_AGO), data)
