"""The unreadable images of a run: a report that lists them, and a bound on their share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightdiff.data.files import ImageFile
from lightdiff.errors import RunError
from lightdiff.run_folder import append_text


@dataclass
class BadFiles:
    """The unreadable images of a run: listed in a report and counted.

    A line holds the number of the --data folder, the path below it, and the reason, separated by tabs: data that have
    moved are still the same. The report is the memory. A resumed run adds to it, and so do other processes and other
    data sets of the same run: no file is listed or counted twice. Nothing is read or written before there is something
    to say.
    """

    report: Path
    total: int  # images of the run, of which a share may be bad
    max_bad: float  # that share
    _seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many files are listed."""
        return len(self._read())

    def add(self, files: Sequence[ImageFile], bad: Sequence[tuple[int, str]]) -> None:
        """List those that are new: their positions in these files, and what is wrong with them.

        Raises:
            RunError: If the share of bad files is larger than tolerated.
        """
        found = [(files[index], reason) for index, reason in bad]
        lines = {(str(file.root), _on_one_line(file.path)): _on_one_line(reason) for file, reason in found}
        if lines.keys() <= self._seen:
            return
        self._seen |= lines.keys()
        listed = self._read()  # again, for what other processes have found
        self.report.parent.mkdir(parents=True, exist_ok=True)
        append_text(self.report, "".join("\t".join((*key, lines[key])) + "\n" for key in lines if key not in listed))
        listed |= lines
        if len(listed) > self.max_bad * self.total + 1e-6:  # 0.29 * 100 is a little less than 29
            some = [f"  {path}: {reason}" for (_, path), reason in list(listed.items())[:3]]
            raise RunError(
                f"{len(listed)} of {self.total} images ({len(listed) / self.total:.2%}) cannot be read, "
                f"more than --max-bad {self.max_bad:g}:",
                *some,
                f"All are listed in {self.report}. Repair or remove them and delete that list, or raise --max-bad.",
            )

    def _read(self) -> dict[tuple[str, str], str]:
        if not self.report.is_file():
            return {}
        text = self.report.read_text(encoding="utf-8", errors="surrogateescape")
        rows = (line.split("\t") for line in text.split("\n"))
        return {(row[0], row[1]): row[2] for row in rows if len(row) == 3}


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
