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
        new = [(index, reason) for index, reason in bad if index not in self._seen]
        if not new:
            return
        self._seen.update(index for index, _ in new)
        listed = self._read()  # again, for what other processes have found
        names = full_paths([self.files[index] for index, _ in new], self.folders)
        lines = {_on_one_line(n): _on_one_line(reason) for n, (_, reason) in zip(names, new, strict=True)}
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("a", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            stream.writelines(f"{name}\t{lines[name]}\n" for name in lines if name not in listed)
        listed |= lines
        if len(listed) > self.max_bad * len(self.files) + 1e-6:  # 0.29 * 100 is a little less than 29
            some = "".join(f"  {name}: {reason}\n" for name, reason in list(listed.items())[:3])
            raise RunError(
                f"{len(listed)} of {len(self.files)} images ({len(listed) / len(self.files):.2%}) cannot be read, "
                f"more than --max-bad {self.max_bad:g}:\n{some}"
                f"All are listed in {self.report}. Repair or remove them and delete that list, or raise --max-bad."
            )

    def _read(self) -> dict[str, str]:
        if not self.report.exists():
            return {}
        text = self.report.read_text(encoding="utf-8", errors="surrogateescape")
        return dict(line.partition("\t")[::2] for line in text.split("\n") if line)


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
