"""What goes wrong, in two kinds: a user's mistake (exit code 2) and a failure at run time (exit code 1)."""

import errno
import re

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk, a quota that is used up
# What moves a terminal's cursor, sets its title or reverses its lines; and bytes of names that are no UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONG = re.compile(r"[^\s/\\]{201,}")
MAX_VALUE = 200  # characters of a value from outside that a message repeats


def printable(text: str) -> str:
    r"""A text on one line, with control characters and what reverses lines escaped: \n, \x1b, \u202e."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shorten(value: object) -> str:
    """A value from outside as a message repeats it: its beginning, if it is long."""
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


class LightdiffError(Exception):
    """A problem that is told in one readable message instead of a traceback: a line for each argument."""

    exit_code = 1

    def __str__(self) -> str:
        lines = (printable(str(line)) for line in self.args)
        return "\n".join(LONG.sub(lambda found: shorten(found[0]), line) for line in lines)


class UserError(LightdiffError):
    """Something the user can put right: a setting, a path, a file. Found before any long work starts."""

    exit_code = 2


class RunError(LightdiffError):
    """Something that failed while running: a full disk, a loss that is not finite, too many unreadable images."""

    exit_code = 1


class Stopped(LightdiffError):
    """The run was asked to stop and has saved its state; 128 + the signal's number, or 75 when its time is up."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Keep the message, and the exit code that shells and job scripts expect."""
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, int]]:
        """Travel between processes whole."""
        return Stopped, (str(self), self.exit_code)


class NoRoom(RunError):
    """A disk too full for what is to be saved."""


class Damaged(UserError):
    """A file that is cut off, has a flipped bit, or is no snapshot at all."""


def from_os(error: OSError, path: object = None) -> RunError:
    """What the operating system has refused, in a sentence; `path` is what was to be written, if that is known."""
    where, why = path or error.filename or "a file", error.strerror or str(error)
    failed = f"{where} could not be written: {why}; what was saved before is untouched"
    if error.errno in FULL:
        return NoRoom(f"{failed}; make room and run the same command again")
    if path:
        return RunError(failed)
    return RunError(f"{where}: {why}" if error.filename else f"the system refused a file or connection: {why}")


def not_divisible(size: tuple[int, int], factor: int) -> UserError:
    """That images of this height and width do not fit networks that halve them, with the nearest that do."""
    below = [side // factor * factor for side in size]
    above = [-(-side // factor) * factor for side in size]
    shown, *fits = (str(h) if h == w else f"{h}x{w}" for h, w in (size, below, above) if h and w)
    return UserError(f"--resolution: {shown} is not divisible by {factor}; the nearest that fit: {' or '.join(fits)}")
