"""The unreadable images of a run: a report that lists them, and a bound on their share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightdiff.data.files import ImageFile, full_paths
from lightdiff.errors import RunError


@dataclass
class BadFiles:
    """The unreadable images of a run: listed in a report, one "path<TAB>reason" a line, and counted.

    The report is the memory. A resumed run adds to it, and so do other processes and other data sets of the same run:
    no file is listed or counted twice. Nothing is read or written before there is something to say.
    """

    report: Path
    files: Sequence[ImageFile]  # all images of the run, of which a share may be bad
    folders: Sequence[Path]  # what each file's `root` counts
    max_bad: float  # that share
    _seen: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many files are listed."""
        return len(self._read())

    def add(self, bad: Sequence[tuple[int, str]]) -> None:
        """List those that are new: their positions in `files`, and what is wrong with them.

        Raises:
            RunError: If the share of bad files is larger than tolerated.
        """
        new = {index: reason for index, reason in bad if index not in self._seen}
        if not new:
            return
        self._seen.update(new)
        listed = self._read()  # again, for what other processes have found
        names = full_paths([self.files[index] for index in new], self.folders)
        lines = {_on_one_line(n): _on_one_line(reason) for n, reason in zip(names, new.values(), strict=True)}
        lines = {name: reason for name, reason in lines.items() if name not in listed}
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("a", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            stream.write("".join(f"{name}\t{reason}\n" for name, reason in lines.items()))
        listed.update(lines)
        # 0.29 * 100 is a little less than 29.
        if len(listed) > self.max_bad * len(self.files) + 1e-6:
            raise RunError(self._too_many(listed))

    def _read(self) -> dict[str, str]:
        if not self.report.exists():
            return {}
        text = self.report.read_text(encoding="utf-8", errors="surrogateescape")
        pairs = (line.partition("\t") for line in text.split("\n") if line)
        return {name: reason for name, _, reason in pairs}

    def _too_many(self, listed: dict[str, str]) -> str:
        count, total = len(listed), len(self.files)
        first = [f"  {name}: {reason}" for name, reason in list(listed.items())[:3]]
        return "\n".join(
            [
                f"{count} of {total} images ({count / max(total, 1):.2%}) cannot be read, "
                f"more than --max-bad {self.max_bad:g}:",
                *first,
                f"All of them are listed in {self.report}. Repair or remove them and delete that list, "
                "or raise --max-bad.",
            ]
        )


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
