"""A data set of small cartoon faces, drawn from known factors, for trying a model without any download."""

import hashlib
import random
from dataclasses import astuple, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from lightdiff.errors import UserError

Color = tuple[int, int, int]


def _palette(text: str) -> tuple[Color, ...]:
    return tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in text.split())


BACKGROUNDS = _palette("ffd166 7ec8e3 a8e0b4 f7a8a0 c4b5f0 faf0d7 5e8cbe 46a096")
SKINS = _palette("ffe0c4 f7cba5 e2ac7e be8258 8d5a3c 66402c")
HAIRS = _palette("261e22 5c3722 a85c28 eec45c d44e2e cdcdd4 de5c96")
CLOTHES = _palette("e44848 345caa 2e8c62 f5f5f0 704898 303648 f49632")
IRISES = _palette("54341e 2c70be 348a4a")
FRAMES = _palette("1c1a22 be2834 1e3e82")
WHITE, INK, LIPS, BRIGHT_LIPS, TONGUE, LENS, GLARE = _palette("ffffff 281a20 8c2430 e26870 f0787c 181820 828caa")
HAIR_STYLES = ("bald", "short", "swept", "long", "bob", "bun", "curly", "spiky", "beanie")
BEARDED_STYLES = {"bald", "short", "swept", "curly", "beanie"}
MOUTHS = ("smile", "grin", "neutral", "open")
CLASSES = ("plain", "glasses", "shades")
HEAD_X, HEAD_Y, EYE_X, MOUTH_Y = 0.285, 0.31, 0.125, 0.17


@dataclass(frozen=True)
class Face:
    """The known factors of one drawing.

    Shifts are fractions of the image's side and `scale` enlarges the whole face; `eye_openness` is the eye's height
    over its width, `gaze` runs from -1 (left) to 1 (right), and `eyewear` is one of `CLASSES`.
    """

    background: Color
    skin: Color
    hair_style: str
    hair: Color
    clothes: Color
    iris: Color
    eye_size: float
    eye_openness: float
    gaze: float
    mouth: str
    mouth_width: float
    eyewear: str
    frame: Color
    beard: bool
    shift_x: float
    shift_y: float
    scale: float


def random_face(seed: int, index: int) -> Face:
    """The face numbered `index` in the endless series that belongs to `seed`."""
    # Hashing, unlike adding the two numbers, keeps the series of neighbouring seeds apart.
    rng = random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest(), "big"))

    def color(palette: tuple[Color, ...]) -> Color:
        # Nearly the same offset for all three channels: the tone varies, the hue (a healthy skin's too) stays.
        base, light = rng.choice(palette), rng.randint(-12, 12)
        r, g, b = (min(255, max(0, part + light + rng.randint(-3, 3))) for part in base)
        return r, g, b

    style = rng.choice(HAIR_STYLES)
    return Face(
        background=color(BACKGROUNDS),
        skin=color(SKINS),
        hair_style=style,
        hair=color(HAIRS),
        clothes=color(CLOTHES),
        iris=color(IRISES),
        eye_size=round(rng.uniform(0.068, 0.084), 4),
        eye_openness=round(rng.uniform(0.65, 1.1), 3),
        gaze=round(rng.uniform(-1.0, 1.0), 3),
        mouth=rng.choice(MOUTHS),
        mouth_width=round(rng.uniform(0.09, 0.125), 4),
        eyewear=rng.choices(CLASSES, weights=(40, 35, 25))[0],
        frame=color(FRAMES),
        beard=rng.random() < 0.3 and style in BEARDED_STYLES,
        shift_x=round(rng.uniform(-0.03, 0.03), 4),
        shift_y=round(rng.uniform(-0.02, 0.02), 4),
        scale=round(rng.uniform(1.0, 1.1), 4),
    )


def face_class(face: Face) -> str:
    """One of `CLASSES`: what the face wears over its eyes."""
    return face.eyewear


def _blend(color: Color, other: Color, share: float) -> Color:
    r, g, b = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return r, g, b


class _Pen:
    """Draws in face coordinates: the origin is the face's centre, y points down, 1.0 is the side times `scale`."""

    def __init__(self, image: Image.Image, face: Face) -> None:
        self._draw = ImageDraw.Draw(image)
        self._unit = image.width * face.scale
        self._origin = image.width * (0.5 + face.shift_x), image.width * (0.53 + face.shift_y)

    def _at(self, *flat: float) -> list[tuple[float, float]]:
        x0, y0 = self._origin
        return [(x0 + x * self._unit, y0 + y * self._unit) for x, y in zip(flat[::2], flat[1::2], strict=True)]

    def oval(self, x: float, y: float, rx: float, ry: float, color: Color, cut: tuple[int, int] = (0, 360)) -> None:
        self._draw.chord(self._at(x - rx, y - ry, x + rx, y + ry), *cut, fill=color)

    def arc(self, x: float, y: float, rx: float, ry: float, color: Color, cut: tuple[int, int], wide: float) -> None:
        box = self._at(x - rx, y - ry, x + rx, y + ry)
        self._draw.arc(box, *cut, fill=color, width=round(wide * self._unit))

    def slab(self, left: float, top: float, right: float, bottom: float, radius: float, color: Color) -> None:
        self._draw.rounded_rectangle(self._at(left, top, right, bottom), radius * self._unit, fill=color)

    def shape(self, color: Color, *flat: float) -> None:
        self._draw.polygon(self._at(*flat), fill=color)


def _hair_behind(pen: _Pen, style: str, hair: Color) -> None:
    if bottom := {"long": 0.4, "bob": 0.22}.get(style):
        pen.slab(-0.345, -0.37, 0.345, bottom, 0.28, hair)
        pen.slab(-0.345, -0.05, 0.345, bottom, 0.09, hair)
    elif style == "curly":
        for x, y in ((-0.28, 0.0), (-0.28, -0.15), (-0.2, -0.26), (-0.07, -0.32)):
            pen.oval(x, y, 0.12, 0.12, hair)
            pen.oval(-x, y, 0.12, 0.12, hair)
    elif style in ("short", "swept", "spiky", "bun"):
        pen.oval(0.0, -0.07, 0.305, 0.29, hair)
    if style == "bun":
        pen.oval(0.0, -0.35, 0.12, 0.11, hair)


def _hair_in_front(pen: _Pen, style: str, face: Face) -> None:
    if style in ("short", "spiky", "bob"):
        pen.oval(0.0, -0.04, 0.305, 0.32, face.hair, (205, 335))
    if style == "spiky":
        for x in (-0.2, -0.1, 0.0, 0.1, 0.2):
            pen.shape(face.hair, x - 0.09, -0.2, x * 1.35, -0.44 + abs(x) * 0.4, x + 0.09, -0.2)
    elif style == "swept":
        pen.oval(0.0, -0.04, 0.305, 0.335, face.hair, (190, 340))
        pen.oval(0.09, 0.0, 0.2, 0.16, face.skin)
    elif style in ("long", "bun"):
        pen.oval(0.0, -0.03, 0.3, 0.31, face.hair, (180, 360))
        pen.oval(0.0, 0.02, 0.245, 0.22, face.skin)
    elif style == "curly":
        pen.oval(0.0, -0.27, 0.16, 0.1, face.hair)
        for x in (-0.2, -0.07, 0.07, 0.2):
            pen.oval(x, -0.235 + abs(x) * 0.3, 0.095, 0.095, face.hair)
    elif style == "beanie":
        pen.oval(0.0, -0.4, 0.07, 0.07, WHITE)
        pen.oval(0.0, -0.1, 0.305, 0.28, face.clothes, (180, 360))
        pen.slab(-0.32, -0.2, 0.32, -0.105, 0.04, _blend(face.clothes, INK, 0.25))


def _eye(pen: _Pen, x: float, face: Face) -> None:
    size, tall, look = face.eye_size, face.eye_size * face.eye_openness, x + face.gaze * face.eye_size * 0.3
    pen.arc(x, -0.09, 0.08, 0.055, _blend(face.hair, INK, 0.3), (215, 325), 0.028)
    pen.oval(x, 0.0, size, tall, WHITE)
    pen.oval(look, 0.0, size * 0.66, min(tall, size * 0.66), face.iris)
    pen.oval(look, 0.0, size * 0.4, min(tall, size * 0.4), INK)
    pen.oval(look + size * 0.22, -size * 0.24, size * 0.17, size * 0.17, WHITE)


def _mouth(pen: _Pen, kind: str, wide: float, lips: Color) -> None:
    if kind == "smile":
        pen.arc(0.0, MOUTH_Y - 0.05, wide, 0.09, lips, (15, 165), 0.034)
    elif kind == "grin":
        pen.oval(0.0, MOUTH_Y - 0.035, wide + 0.01, 0.105, LIPS, (0, 180))
        pen.slab(-wide * 0.85, MOUTH_Y - 0.035, wide * 0.85, MOUTH_Y + 0.005, 0.01, WHITE)
    elif kind == "open":
        pen.oval(0.0, MOUTH_Y + 0.01, wide * 0.6, 0.06, LIPS)
        pen.oval(0.0, MOUTH_Y + 0.04, wide * 0.38, 0.025, TONGUE)
    else:
        pen.slab(-wide * 0.8, MOUTH_Y - 0.015, wide * 0.8, MOUTH_Y + 0.015, 0.014, lips)


def _eyewear(pen: _Pen, kind: str, frame: Color) -> None:
    for left in (-0.29, -0.03, 0.23):
        pen.slab(left, -0.035, left + 0.06, 0.0, 0.0, frame)
    for x in (-EYE_X, EYE_X):
        if kind == "shades":
            pen.slab(x - 0.12, -0.08, x + 0.12, 0.09, 0.06, frame)
            pen.slab(x - 0.1, -0.06, x + 0.1, 0.07, 0.045, LENS)
            pen.shape(GLARE, x - 0.07, -0.045, x - 0.01, -0.045, x - 0.07, 0.04)
        else:
            pen.arc(x, 0.0, 0.12, 0.12, frame, (0, 360), 0.036)


def draw_face(face: Face, size: int = 32) -> Image.Image:
    """An antialiased RGB picture of the face, `size` pixels wide and high."""
    factor = 8 if size <= 64 else 4
    image = Image.new("RGB", (size * factor, size * factor), face.background)
    pen, skin, shadow = _Pen(image, face), face.skin, _blend(face.skin, INK, 0.14)
    _hair_behind(pen, face.hair_style, face.hair)
    pen.oval(0.0, 0.56, 0.4, 0.21, face.clothes)
    pen.slab(-0.09, 0.2, 0.09, 0.4, 0.08, shadow)
    for side in (-1, 1):
        pen.oval(side * HEAD_X, 0.02, 0.05, 0.065, shadow)
    pen.oval(0.0, 0.0, HEAD_X, HEAD_Y, skin)
    _hair_in_front(pen, face.hair_style, face)
    if face.beard:
        pen.oval(0.0, 0.0, HEAD_X, HEAD_Y, face.hair, (15, 165))
        pen.oval(0.0, MOUTH_Y + 0.012, 0.145, 0.08, skin)
    for side in (-1, 1):
        if not face.beard:
            pen.oval(side * 0.19, 0.115, 0.05, 0.035, _blend(skin, BRIGHT_LIPS, 0.35))
        _eye(pen, side * EYE_X, face)
    pen.oval(0.0, 0.075, 0.032, 0.024, shadow)
    # Dark lips would vanish on dark skin.
    _mouth(pen, face.mouth, face.mouth_width, LIPS if sum(skin) > 360 else BRIGHT_LIPS)
    if face.eyewear != "plain":
        _eyewear(pen, face.eyewear, face.frame)
    return image.reduce(factor)


def _line(*cells: object) -> str:
    return ",".join("#" + bytes(cell).hex() if isinstance(cell, tuple) else str(cell) for cell in cells) + "\n"


def draw_dataset(folder: Path, count: int, seed: int = 0, size: int = 32) -> None:
    """Write `folder/<class>/<index>.png` for the first `count` faces of `seed`, and their factors in `factors.csv`.

    A folder that already holds exactly this data set is left as it is; an unfinished one is completed. `size` is
    16 to 256. A `UserError` says when it is not, or when the folder holds PNG files that do not belong here.
    """
    if count < 1 or not 16 <= size <= 256:
        raise UserError(f"toy faces: count must be at least 1 and size 16 to 256, not count={count}, size={size}")
    faces = [random_face(seed, index) for index in range(count)]
    files = [f"{face_class(face)}/{index:05d}.png" for index, face in enumerate(faces)]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    if strangers := sorted(found.difference(files)):
        raise UserError(f"{folder} holds other images, such as {strangers[0]}: choose an empty folder")
    rows = (_line(file, size, *astuple(face)) for file, face in zip(files, faces, strict=True))
    table, table_file = _line("file", "size", *Face.__dataclass_fields__) + "".join(rows), folder / "factors.csv"
    if found.issuperset(files) and table_file.is_file() and table_file.read_text(encoding="utf-8") == table:
        return
    # Removed first and written last: a folder with this table is a finished one.
    table_file.unlink(missing_ok=True)
    for face, file in zip(faces, files, strict=True):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        draw_face(face, size).save(folder / file)
    table_file.write_text(table, encoding="utf-8", newline="\n")
