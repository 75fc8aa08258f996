"""Published weights, downloaded into torch's cache."""

import logging
import socket
from http.client import HTTPException
from pathlib import Path

import torch

from lightdiff.errors import UserError
from lightdiff.models import lpips

CONNECT_SECONDS = 5.0  # a machine without a network should learn so at once

logger = logging.getLogger(__name__)


def fetched(url: str, need: str, otherwise: str) -> Path:
    """A file of weights in torch's cache, downloaded if it is not there.

    Raises:
        UserError: If the download fails; says what is needed, and what else can be done.
    """
    file = lpips.cached(url)
    if file.is_file():
        return file
    logger.info("downloading %s to %s", url, file)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch hands urlopen none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), lpips.published_hash(url), progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: the hash differs
        why = getattr(error, "reason", error)
        advice = f"fetch {url} elsewhere and put it at {file}, {otherwise}"
        raise UserError(f"{need}, and the download failed ({why}): {advice}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file
