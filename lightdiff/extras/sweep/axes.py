"""What a sweep varies: names and values as typed, parsed into settings of a stage."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo

from lightdiff.architectures import Layer
from lightdiff.errors import UserError
from lightdiff.options import Where, extra, flag, flag_fields, nest, parse_number, plain, takes_commas
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    ScaleSettings,
    StageSettings,
    TrainUNetSettings,
    TrainVAESettings,
    parse_names,
    parse_numbers,
)

STAGES: dict[str, type[StageSettings]] = {
    "train-vae": TrainVAESettings,
    "encode": EncodeSettings,
    "scale": ScaleSettings,
    "train-unet": TrainUNetSettings,
    "generate": GenerateSettings,
}
NOT_VARIED = {"run", "job", "restart", "from_step", "vae", "unet", "latents", "out", "name", "num_images"}


@dataclass(frozen=True)
class Axis:
    """A setting of a stage and the values it takes."""

    name: str  # as typed
    stage: str
    path: Where
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    def layer(self, number: int) -> Layer:
        """One of the values, as a layer of its stage's settings."""
        return nest({self.path: self.values[number]})


def parse_axis(argument: str, option: str = "--vary") -> Axis:
    """The axis that `kl-beta=1e-4,1e-2` describes; for --set, with one value.

    Raises:
        UserError: If it is no such assignment, or there is no such setting.
    """
    name, _, text = argument.partition("=")
    name = name.strip().removeprefix("--").replace("_", "-")
    stage, path = find_setting(name, option)
    info = flag_fields(STAGES[stage])[path]
    texts = [text.strip()]
    if option == "--vary":
        lists = takes_list(info)
        texts = [part.strip() for part in text.split(";" if lists or ";" in text else ",")]
        if len(texts) < 2:
            how = f"in quotes, with ';' between its lists: '{name}=32,64;64,128'" if lists else f"{name}=VALUE,VALUE"
            raise UserError(f"--vary {argument}: two values or more are needed, {how}")
    if not all(texts):
        raise UserError(f"{option} {argument}: a value is missing")
    values = (parse_value(info, f"{option} {argument}", text) for text in texts)
    return Axis(name, stage, path, tuple(texts), tuple(values))


def find_setting(name: str, option: str) -> tuple[str, Where]:
    """The stage and the field that a name stands for, with or without the stage in front.

    Raises:
        UserError: If there is no such setting, or more than one.
    """
    first, _, rest = name.partition(".")
    wanted = {first: STAGES[first]} if first in STAGES else STAGES
    short = rest if first in STAGES else name
    known = {
        (stage, flag(model, path)): path
        for stage, model in STAGES.items()
        for path in flag_fields(model)
        if not {path[0], path[-1]} & NOT_VARIED
    }
    found = [(stage, known[stage, short]) for stage in wanted if (stage, short) in known]
    if len(found) == 1:
        return found[0]
    if found:
        places = " or ".join(f"{stage}.{short}" for stage, _ in found)
        raise UserError(f"{option} {name}: several stages have this setting; choose one: {places}")
    names = sorted({name for _, name in known})
    near = get_close_matches(short, names, n=4) or [n for n in names if n.split(".")[-1].startswith(short[:3])]
    meant = [f"{stage}.{n}" if first in STAGES else n for n in near for stage, other in known if other == n]
    hint = f"; similar ones: {', '.join(dict.fromkeys(meant))}" if near else ""
    where = f"{first} has" if first in STAGES else "no stage has"
    raise UserError(f"{option} {name}: {where} {'no such' if first in STAGES else 'such a'} setting to vary{hint}")


def takes_list(info: FieldInfo) -> bool:
    """Whether a setting takes a list."""
    return takes_commas(info) or bool(extra(info, "repeated"))


def parse_value(info: FieldInfo, argument: str, text: str) -> Any:
    """A value in the form that pydantic validates."""
    if extra(info, "repeated"):
        return [part.strip() for part in text.split(",")]
    if not takes_commas(info):
        return parse_number(plain(info.annotation), argument, text, f"{argument.partition('=')[0]}=1")
    return parse_names(text) if str in get_args(plain(info.annotation)) else parse_numbers(text)
