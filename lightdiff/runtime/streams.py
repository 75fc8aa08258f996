"""Messages and results on streams whose other end may go away at any time."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any


class Lasting:
    """A stream that outlives its reader: once nobody reads any more, what is written to it goes nowhere."""

    def __init__(self, stream: Any, gone: Callable[[OSError], bool]) -> None:
        """Wrap a stream; `gone` tells of an error whether nobody reads any more."""
        self._stream, self._gone = stream, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as far as somebody reads."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        """Hand on what is written, as far as somebody reads."""
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """Let this and all else that writes to the same place, such as libraries in C++, write to nowhere."""
        if not self._gone(error):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """Let no message end a run: where nobody reads, or the log's disk is full, it goes on silently.

    Results that cannot be written are another thing: there, only a reader that is gone is passed over.
    """
    for number in (0, 1, 2):  # a closed one would be the number of the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, messages = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout = Lasting(out, lambda error: error.errno == errno.EPIPE or (error.errno == errno.EIO and out.isatty()))
    sys.stderr = Lasting(messages, lambda error: True)
