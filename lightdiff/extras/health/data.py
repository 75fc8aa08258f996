"""What a run's images show: duplicates, and pictures that are enlarged."""

from collections.abc import Iterator, Sequence
from statistics import median

from lightdiff.data.files import ImageFile, find_images
from lightdiff.data.survey import SAMPLE, evenly, look_at, scale_of
from lightdiff.extras.evidence import try_read
from lightdiff.extras.health.finding import Finding, quote_path
from lightdiff.extras.inspect import duplicate_groups
from lightdiff.settings import ImageSettings

DUPLICATES = 0.01
ENLARGED = 0.2
MAX_FILES, MAX_BYTES = 20_000, 200_000_000  # of a search for duplicates; larger data sets are left to `inspect`


def check_data(images: ImageSettings) -> Iterator[Finding]:
    """What the images show, where the folders exist and can be searched quickly."""

    def refuse_many(count: int) -> None:
        if count > MAX_FILES:
            raise ValueError("too many files to search quickly")

    found = try_read(lambda: find_images(images.data, images.val_share, refuse_many))
    files: Sequence[ImageFile] = found.files if found else []
    if 0 < len(files) <= MAX_FILES:
        yield from check_duplicates(images, files)
        looked = try_read(lambda: look_at(evenly(files, SAMPLE), images, lambda image: image.size)) or []
        yield from check_sizes(images, [size for _, size in looked])


def check_duplicates(images: ImageSettings, files: Sequence[ImageFile]) -> Iterator[Finding]:
    """Files with the same bytes."""
    found = try_read(lambda: duplicate_groups(files, images.data, MAX_BYTES)) or []
    groups = [[files[i].split for i in group] for group in found]
    spare = sum(len(splits) - 1 for splits in groups)
    leaks = sum(splits.count("val") for splits in groups if "train" in splits)
    held_out = sum(file.split == "val" for file in files)
    if spare > DUPLICATES * len(files) or leaks > DUPLICATES * held_out:
        also = f"; {leaks} of {held_out} held-out images are also among the training images" if leaks else ""
        yield Finding(
            code="duplicates",
            stage="data",
            title="The data contain duplicates",
            measured=f"{spare:,} of {len(files):,} files repeat another one, byte for byte{also}",
            usual=f"less than {DUPLICATES:.0%}; duplicates are memorised first",
            advice=f"lightdiff inspect {quote_path(images.data[0])} lists them: remove them, and use --restart",
        )


def check_sizes(images: ImageSettings, found: list[tuple[int, int]]) -> Iterator[Finding]:
    """Images, of these widths and heights, that are smaller than the resolution."""
    share, sides = sum(scale_of(size, images) < 1 for size in found) / max(1, len(found)), [min(size) for size in found]
    if share > ENLARGED:
        yield Finding(
            code="enlarged",
            stage="data",
            title="Many images are smaller than --resolution, and enlarged",
            measured=f"{share:.0%} of {len(sides)} images looked at; median shorter side: {median(sides):g} pixels",
            usual=f"less than {ENLARGED:.0%} smaller than {images.resolution} pixels; more teach the model to blur",
            advice="larger images, or lightdiff train-vae --restart with a lower --resolution",
        )
