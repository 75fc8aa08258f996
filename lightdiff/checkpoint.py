"""One .safetensors file = one snapshot: tensors, and one JSON metadata that says what they are.

The metadata holds a digest of every tensor, and one over names, dtypes, shapes and itself, so that a flipped bit
anywhere is found when it is read. Files appear by rename: a reader never sees half of one.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightdiff import __version__
from lightdiff.errors import Damaged, UserError
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import atomic_write
from lightdiff.settings import LoopSettings

FORMAT = 1  # raised when a reader of today could not read a file of tomorrow
KEY = "lightdiff"  # the one key of the file's metadata
S = TypeVar("S", bound=BaseModel)
STAGES = {
    "vae": "a VAE",
    "unet": "a U-Net",
    "latents": "a shard of latents",
    "index": "an index of latents",
    "images": "a list of images",
    "archive": "an index of archives",
}
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Metadata(BaseModel):
    """What a snapshot says of itself."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # else a PSNR of inf is saved as null

    format: int = FORMAT
    lightdiff: str = __version__
    stage: str
    settings: dict[str, Any] = Field(default_factory=dict)
    step: Count = 0
    images_seen: Count = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    lineage: dict[str, str] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)
    digests: dict[str, str] = Field(default_factory=dict)
    digest: str = ""

    def compute_digest(self, tensors: Mapping[str, tuple[str, list[int]]]) -> str:
        """The digest over this metadata without its own digest, and over each tensor's name, dtype and shape."""
        about = self.model_dump(mode="json", exclude={"digest"})
        text = json.dumps([about, sorted((name, *what) for name, what in tensors.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def weights_digest(self, prefix: str) -> str:
        """One digest of all tensors below a prefix, independent of what else the file holds."""
        rows = sorted((name.removeprefix(prefix), d) for name, d in self.digests.items() if name.startswith(prefix))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Checkpoint:
    """A snapshot opened for reading. Tensors are read, and verified, when they are asked for."""

    def __init__(self, path: Path, stage: str | None = None) -> None:
        """Open a file and verify its metadata.

        Raises:
            UserError: If there is no such file, or it is no snapshot of this stage that this version can read.
        """
        self.path = path
        self._verified: set[str] = set()
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {kind}; name a checkpoint file (.safetensors)")
        try:
            self._file: Any = safe_open(path, framework="pt")
            metadata: dict[str, str] = self._file.metadata() or {}  # type: ignore[no-untyped-call]
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such checkpoint") from None
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise Damaged(f"{path} is damaged or no checkpoint: {error}") from None
        if KEY not in metadata:
            raise Damaged(f"{path} is no checkpoint of lightdiff")
        self.metadata = self._read_metadata(metadata[KEY])
        if stage is not None and self.metadata.stage != stage:
            wanted, found = (STAGES.get(s, s) for s in (stage, self.metadata.stage))
            raise UserError(f"{path} holds {found}, but {wanted} is needed here")

    def _read_metadata(self, text: str) -> Metadata:
        try:
            raw = json.loads(text)
            version = raw.get("format")
            if isinstance(version, int) and version > FORMAT:
                raise UserError(
                    f"{self.path} has format {version}, written by lightdiff {raw.get('lightdiff')}; "
                    f"this lightdiff {__version__} reads up to format {FORMAT}: upgrade it"
                )
            metadata = Metadata.model_validate(raw)
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            layout = {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
            whole = metadata.compute_digest(layout) == metadata.digest and set(layout) == set(metadata.digests)
        except (ValueError, RecursionError, AttributeError, MemoryError, SafetensorError):
            raise Damaged(f"{self.path} is damaged: its metadata cannot be read") from None
        if not whole:
            raise Damaged(f"{self.path} is damaged: its header or metadata does not match its digest")
        return metadata

    def close(self) -> None:
        """Let go of the file, which a newer one may replace; the metadata stays."""
        self._file = None

    def settings(self, model: type[S], *path: str) -> S:
        """The settings saved in it, or a part of them.

        Raises:
            Damaged: If they are none of this kind.
        """
        found: Any = self.metadata.settings
        try:
            for name in path:
                found = found[name]
            return model.model_validate(found)
        except ValidationError as error:  # whole, as its digest is right, but not of this version
            first = error.errors()[0]
            where = ".".join(map(str, (*path, *first["loc"])))
            raise Damaged(
                f"{self.path}: its settings cannot be read by this lightdiff, {__version__}; "
                f"{self.metadata.lightdiff} wrote it: {where}: {first['msg']}"
            ) from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Damaged(f"{self.path} is damaged: its settings cannot be read") from None

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors below a prefix."""
        return [name for name in self.metadata.digests if name.startswith(prefix)]

    def tensor(self, name: str) -> Tensor:
        """One tensor, verified."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{self.path} is damaged: {name}: {error}") from None
        if name not in self._verified and tensor_digest(tensor) != self.metadata.digests[name]:
            raise Damaged(f"{self.path} is damaged: {name} does not match its digest")
        self._verified.add(name)
        return tensor

    def verify(self) -> "Checkpoint":
        """Read everything once, so that nothing later finds it damaged.

        Raises:
            Damaged: If any tensor does not match its digest.
        """
        for name in self.names():
            self.tensor(name)
        return self

    def shapes(self, prefix: str) -> dict[str, list[int]]:
        """The shapes of all tensors below a prefix, by their names without it; no tensor is read."""
        return {name.removeprefix(prefix): self._file.get_slice(name).get_shape() for name in self.names(prefix)}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below a prefix, verified, by their names without it."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}

    def weights(self, ema: float | None = None) -> dict[str, Tensor]:
        """The weights below `weights_prefix`, by their names without it."""
        return self.tensors(self.weights_prefix(ema))

    def weights_prefix(self, ema: float | None = None) -> str:
        """The prefix of the weights averaged with this decay; 0: the raw ones; None: the first EMA, if there is any.

        Raises:
            UserError: If they were not averaged with this decay.
        """
        if ema is None:
            return "ema." if self.names("ema.") else "model."
        decays = self.settings(LoopSettings, "loop").ema_decay if ema else ()
        prefixes = {0.0: "model."} | dict(zip(decays, ema_prefixes(decays), strict=True))
        if ema not in prefixes:
            raise UserError(f"--ema {ema:g}: {self.path} has {', '.join(map(str, prefixes))} (0: the raw weights)")
        return prefixes[ema]


def ema_prefixes(decays: Sequence[float]) -> list[str]:
    """The prefix of the weights averaged with each decay: `ema.` for the first, `ema-0.99.`, say, for any other."""
    return [f"ema-{decay}." if i else "ema." for i, decay in enumerate(decays)]


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Metadata, digests: Mapping[str, str] | None = None
) -> Metadata:
    """Write a snapshot, atomically, and return its metadata with all digests; `digests` are those known already.

    Raises:
        RunError: If it cannot be written; what was there before is untouched.
    """
    ready, known = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, digests or {}
    found = {name: known[name] if name in known else tensor_digest(tensor) for name, tensor in ready.items()}
    metadata = metadata.model_copy(update={"digests": found})
    metadata.digest = metadata.compute_digest({n: (DTYPES[t.dtype], list(t.shape)) for n, t in ready.items()})
    header = {KEY: json.dumps(metadata.model_dump(mode="json"))}  # in ASCII: a path need not be valid UTF-8

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata=header)
        except SafetensorError as error:
            code = re.search(r"(?:os error|code:) (\d+)", str(error))  # as Rust words it
            number = int(code[1]) if code else 0
            raise OSError(number or errno.EIO, os.strerror(number) if number else str(error)) from error

    atomic_write(path, write)
    return metadata


def load_weights(model: nn.Module, source: Checkpoint, prefix: str) -> None:
    """Load a snapshot's tensors below a prefix into a network.

    Raises:
        UserError: If names or shapes differ, as after a change of architecture.
    """
    check_fit(f"{source.path} does not fit this architecture", model, source.shapes(prefix))
    model.load_state_dict(source.tensors(prefix))


def check_own(build: Callable[[], nn.Module], source: Checkpoint, prefix: str) -> None:
    """Check, in no memory, that a snapshot's settings make the network of its tensors, whatever sizes it claims.

    Raises:
        UserError: If not.
    """
    try:
        with torch.device("meta"):
            check_fit(f"{source.path} does not fit this architecture", build(), source.shapes(prefix))
    except (ValueError, IndexError, RuntimeError) as error:
        raise Damaged(f"{source.path} is damaged: its settings make no network ({error})") from None


def check_fit(what: str, model: nn.Module, found: Mapping[str, Sequence[int]]) -> None:
    """Check that tensors of these names and shapes are those of a network.

    Raises:
        UserError: If not; it begins with `what`, as "x.safetensors does not fit its settings".
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if expected != (shapes := {name: tuple(shape) for name, shape in found.items()}):
        raise on_demand("wrong_weights:misfit")(what, expected, shapes)


DTYPES = {  # in the words of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
