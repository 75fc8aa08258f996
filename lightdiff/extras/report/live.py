"""A live report: the page of a run on localhost, which renews itself while a training goes on. It only reads."""

import errno
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightdiff.errors import LightdiffError, UserError
from lightdiff.extras.report.collect import RunFacts, collect
from lightdiff.extras.report.page import render
from lightdiff.run_folder import INDEX, RunFolder
from lightdiff.runtime.progress import console

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # a page of another name is somebody else's that was made to lead here
SHARE = 0.1  # of a processor's time that renewing the page takes at most
EVERY, RARELY = 2.0, 30.0  # seconds between two looks: at least, at most


def serve(runs: list[Path], port: int) -> None:
    """Serve the page of these runs until Ctrl-C.

    Raises:
        UserError: If a run does not exist, or the port is taken.
    """
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is no run folder")
    with open_server(LivePage(runs), port) as server:
        console.print(f"http://{HOST}:{server.server_port}/ shows {', '.join(map(str, runs))}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("no longer served; nothing was changed")


class Server(ThreadingHTTPServer):
    """On this machine alone, and silent about readers that leave."""

    allow_reuse_address = False  # on Windows, two servers could then share a port
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader is gone, or asked for what is no request."""


def open_server(page: "LivePage", port: int) -> Server:
    """A server of the page, at a port that is listened on from now.

    Raises:
        UserError: If the port is taken, or may not be used.
    """
    try:
        return Server((HOST, port), partial(Handler, page))
    except OSError as error:
        why = "is used by another program" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"--port: {port} {why}; choose another, or --port 0 for any that is free") from None


class Handler(BaseHTTPRequestHandler):
    """Answers for the page and its state; there is nothing else, and nothing to write."""

    server_version, sys_version = "lightdiff", ""

    def __init__(self, page: "LivePage", *rest: Any) -> None:
        self.page = page
        super().__init__(*rest)

    def do_GET(self) -> None:
        """Send the page, or its state."""
        try:
            if self.headers.get("Host", "").partition(":")[0] not in NAMES:
                self.answer(403, "text/plain", "only as localhost")
            elif self.path == "/":
                self.answer(200, "text/html", self.page.html())
            elif self.path == "/state":
                self.answer(200, "application/json", json.dumps({"state": self.page.state(), "wait": self.page.wait}))
            else:
                self.answer(404, "text/plain", "not here")
        except ConnectionError:
            raise  # the reader is gone
        except Exception as error:  # of a file that is being replaced, or that was made to harm: asked for again soon
            self.answer(500, "text/plain", f"{type(error).__name__}: {error}")

    def answer(self, code: int, kind: str, text: str) -> None:
        """Send a text."""
        content = text.encode(errors="replace")
        self.send_response(code)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests come every other second."""


class LivePage:
    """The page, made anew when a file of the runs has changed and somebody asks."""

    def __init__(self, runs: list[Path]) -> None:
        self.runs, self.wait = runs, EVERY
        self._lock, self._state, self._html = threading.Lock(), "", ""

    def state(self) -> str:
        """What changes when one of the files does that the page shows."""
        seen = [(str(path), *look(path)) for run in self.runs for path in shown_files(RunFolder(run))]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def html(self) -> str:
        """The page as of now."""
        with self._lock:  # one at a time, whoever asks
            state = self.state()
            if state != self._state:
                began = time.thread_time()
                self._html, self._state = render([read(run) for run in self.runs], state), state
                self.wait = min(max(EVERY, (time.thread_time() - began) / SHARE), RARELY)
            return self._html


def shown_files(run: RunFolder) -> Iterator[Path]:
    """The files and folders whose changes the page shows."""
    for stage in (run.vae, run.unet):
        yield from (stage.settings, stage.metrics, stage.images, stage.last)
    yield from (run.latents / INDEX, run.path / "evaluation" / "metrics.json")


def look(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def read(run: Path) -> RunFacts:
    """A run's facts as its files have them; a reason in place of what is not there yet."""
    try:
        return collect(run, None)
    except LightdiffError as error:
        return RunFacts(run, missing={"vae": str(error)})
