"""The live report: what it serves, to whom, that it only reads, and how a browser follows a training with it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import VAE_FLAGS, call

from lightdiff.extras.report.live import LivePage, open_server, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def served(run: Path) -> Iterator[int]:
    """A live page of a run, and its port."""
    with open_server(LivePage([run]), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/", method: str = "GET", host: str = "localhost") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def test_it_serves_the_page_and_writes_nothing(run):
    before = files_in(run)
    with served(run) as port:
        code, page = ask(port, host=f"127.0.0.1:{port}")
        state = json.loads(ask(port, "/state")[1])
        assert code == 200
        assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
        assert json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["live"] == state["state"]
        assert "step 3 of" not in page  # it has all its steps
        assert state["wait"] >= 2
        assert json.loads(ask(port, "/state")[1]) == state
        with open(run / "unet/metrics.jsonl", "a") as file:
            file.write('{"step": 4, "loss": 0.125}\n')
        after = json.loads(ask(port, "/state")[1])["state"]
        assert after != state["state"]
        assert "training 0.125" in ask(port)[1]
    (run / "unet/metrics.jsonl").write_text("".join((run / "unet/metrics.jsonl").read_text().splitlines(True)[:-1]))
    assert files_in(run).keys() == before.keys()


def test_it_answers_this_machine_alone_and_only_reads(trained):
    with open_server(LivePage([trained]), 0) as server:
        assert server.server_address[0] == "127.0.0.1"
    with served(trained) as port:
        assert ask(port, "/state", host="elsewhere.example")[0] == 403  # a name that was made to lead here
        assert ask(port, "/vae/settings.json")[0] == 404
        assert ask(port, "/../settings.json")[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            assert ask(port, method=method)[0] == 501


def test_a_run_that_has_not_begun_is_served_until_it_does(tmp_path):
    with served(tmp_path) as port:
        code, page = ask(port)
    assert code == 200
    assert "holds no training" in page


def test_mistakes_are_one_sentence(trained, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = call("report", "--live", trained, "--port", port)
    assert (busy.code, busy.err) == (
        2,
        f"error: --port: {port} is used by another program; choose another, or --port 0 for any that is free",
    )
    assert call("report", "--live", tmp_path / "none").err == f"error: {tmp_path / 'none'} is no run folder"
    assert "--port: 70000 is not between" in call("report", "--live", trained, "--port", 70000).err
    assert "--out: a live page is not written" in call("report", "--live", trained, "--out", "x.html").err


def test_ctrl_c_ends_it_with_a_word(trained, monkeypatch, capsys):
    def interrupted(self, poll_interval=0.5):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightdiff.extras.report.live.Server.serve_forever", interrupted)
    serve([trained], 0)
    assert "no longer served" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM or os.name == "nt", reason="needs chromium and signals")
def test_a_browser_follows_a_training(faces, tmp_path):
    """Steps and a picture appear on the page while a process trains; both commands end at Ctrl-C."""
    sync_api = pytest.importorskip("playwright.sync_api")
    (run := tmp_path / "run").mkdir()
    flags = [*VAE_FLAGS, "--steps", "1000000", "--log-every", "1", "--val-every", "20", "--save-every", "1000000"]
    command = [sys.executable, "-m", "lightdiff"]
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where tests run unattended
    serving = [sys.executable, "-c", f"{heard}; from lightdiff.cli import main; main()", "report", "--live"]
    report = subprocess.Popen([*serving, run, "--port", "0"], stderr=subprocess.PIPE, text=True)
    said = []
    try:
        url = re.search(r"http://\S+", report.stderr.readline())[0]
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            view = browser.new_page()
            view.set_default_timeout(120_000)
            view.on("pageerror", lambda error: said.append(str(error)))
            view.goto(url)
            training = subprocess.Popen(
                [*command, "train-vae", "--run", run, "--data", faces, *flags],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                step = view.locator("#top small", has_text=re.compile(r"step [1-9][\d,]* of 1,000,000"))
                step.wait_for()
                first = step.inner_text()
                view.wait_for_selector("#top img")
                step.filter(has_not_text=first).wait_for()
                view.wait_for_selector(".plot .series >> nth=0")
                assert view.locator("#news").inner_text().startswith("live: as of")
            finally:
                training.send_signal(signal.SIGINT)
                ended = training.wait(timeout=900)
            report.send_signal(signal.SIGINT)
            assert report.wait(timeout=900) == 0
            view.locator("#news", has_text="not live just now").wait_for()
            browser.close()
    finally:
        report.kill()
        _, told = report.communicate()
    assert ended == 130
    assert "Traceback" not in told
    assert said == []
