"""hf://owner/name: folders of the Hugging Face Hub. Needs the extra `hub`, and a network."""

import re
from pathlib import Path
from typing import Any

from lightdiff.errors import RunError, UserError, shorten

PREFIX = "hf://"
ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", re.ASCII)  # owner/name, and a folder or file in it
PATTERNS = ["*.json", "*.safetensors", "*.md"]  # of a repository; nothing that could run


def local_copy(source: str) -> Path:
    """A path as it is; of hf://owner/name, or hf://owner/name/part, a local copy, fetched once.

    Raises:
        UserError: If the address is none, or huggingface_hub is not installed.
        RunError: If it cannot be fetched.
    """
    if not source.startswith(PREFIX):
        return Path(source)
    repository, part = parsed(source)
    return fetched(source, repository, [f"{part}{end}" for end in ("", "/*")] if part else PATTERNS) / part


def fetched(source: str, repository: str, patterns: list[str], **more: str) -> Path:
    """A local copy of a repository's files that fit one of these patterns.

    Raises:
        UserError: If huggingface_hub is not installed.
        RunError: If they cannot be fetched.
    """
    hub = library()
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns, **more))
    except Exception as error:  # of the network, of the hub, of the disk
        raise RunError(f"{source} cannot be fetched: {shorten(first_line(error))}") from None


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a repository, which is made where there is none, and return its address.

    Raises:
        UserError: If the name is none, or huggingface_hub is not installed.
        RunError: If it cannot be uploaded.
    """
    name, part = parsed(PREFIX + repository.removeprefix(PREFIX))
    if part:
        raise UserError(f"--push {shorten(repository)}: give OWNER/NAME")
    try:
        api = library().HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(folder)))
    except Exception as error:
        raise RunError(f"{folder} is written, but cannot be uploaded: {shorten(first_line(error))}") from None


def parsed(source: str) -> tuple[str, str]:
    """owner/name, and what follows."""
    found = ADDRESS.fullmatch(source.removeprefix(PREFIX))
    if not found or ".." in source:
        raise UserError(f"{shorten(source)} is no address: write hf://OWNER/NAME")
    return found[1], found[2] or ""


def library() -> Any:
    """The library huggingface_hub."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("hf:// needs the library huggingface_hub: pip install 'lightdiff[hub]'") from None
    return huggingface_hub


def first_line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
