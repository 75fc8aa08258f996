"""Compare the numbers under "What you should see" with a run: `python docs/tour/check_claims.py runs/demo`.

`nox -s tour` makes a new demo for it. The tests look for a demo in runs/demo, or where LIGHTDIFF_DEMO says.

Each claim is a pattern in a page, whose groups are numbers, and where a finished demo has them. A processor of another
kind rounds differently: numbers may differ by TOLERANCE.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lightdiff.data.index import read_index
from lightdiff.run_folder import RunFolder, StageFolder
from lightdiff.runtime.progress import read_metrics
from lightdiff.stages.scale import channel_bits

TOUR = Path(__file__).parent
TOLERANCE = 0.08  # of a number


class Claim(NamedTuple):
    """Numbers that a page says, and where a run has them."""

    page: str
    pattern: str
    numbers: Callable[[RunFolder], Sequence[float]]


def at(folder: StageFolder, *wanted: tuple[int, str]) -> list[float]:
    """Numbers of metrics.jsonl by step and name."""
    rows = {row["step"]: row for row in read_metrics(folder.metrics)}
    return [rows[step][name] for step, name in wanted]


def bits(run: RunFolder) -> list[float]:
    """The least and the most informative channel's bits."""
    found = read_index(run.latents).statistics
    assert found is not None
    return [min(channel_bits(found)), max(channel_bits(found))]


def megabytes(run: RunFolder) -> list[float]:
    """Images, and the size of their shards."""
    size = sum(shard.stat().st_size for shard in run.latents.glob("shard-*"))
    return [float(read_index(run.latents).encoded.sum()), size / 1e6]


BANDS = [(750, f"val_loss_band_{band}") for band in range(1, 5)]
CLAIMS = (
    Claim(
        "1-vae",
        r"`l1` falls from (.*?) \(step 20\) to (.*?) \(step 450\)",
        lambda r: at(r.vae, (20, "l1"), (450, "l1")),
    ),
    Claim("1-vae", r"from ([\d.]+) to ([\d.]+) nats per element", lambda r: at(r.vae, (20, "kl"), (450, "kl"))),
    Claim("1-vae", r"`val_psnr` is ([\d.]+) dB", lambda r: at(r.vae, (450, "val_psnr"))),
    Claim("2-latents", r"of ([\d,]+) images as float16 \(([\d.]+) MB\)", megabytes),
    Claim("2-latents", r"in use, at ([\d.]+) to ([\d.]+) bits per element", bits),
    Claim(
        "3-unet",
        r"It is ([\d.]+) at step 20 and ([\d.]+) at step 750",
        lambda r: at(r.unet, (20, "loss"), (750, "loss")),
    ),
    Claim(
        "3-unet",
        r"It falls from ([\d.]+) \(step 250\) over ([\d.]+) to ([\d.]+) \(step 750\)",
        lambda r: at(r.unet, *((step, "val_loss") for step in (250, 500, 750))),
    ),
    Claim("3-unet", r"At step 750 they are ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+)\.", lambda r: at(r.unet, *BANDS)),
)


def said(claim: Claim) -> list[float]:
    """The numbers that the page says."""
    text = " ".join((TOUR / f"{claim.page}.md").read_text(encoding="utf-8").split())
    found = re.search(claim.pattern, text)
    if not found:
        raise ValueError(f"{claim.page}.md says nothing like {claim.pattern}")
    return [float(number.replace(",", "")) for number in found.groups()]


def wrong(run: RunFolder) -> list[str]:
    """The claims that do not hold in a run."""
    problems = []
    for claim in CLAIMS:
        pairs = list(zip(said(claim), claim.numbers(run), strict=True))
        if any(abs(page - measured) > TOLERANCE * abs(measured) for page, measured in pairs):
            problems.append(f"{claim.page}.md, {claim.pattern}: " + ", ".join(f"{a:g} is {b:.4g}" for a, b in pairs))
    return problems


if __name__ == "__main__":
    sys.exit("\n".join(wrong(RunFolder(Path(sys.argv[1])))) or 0)
