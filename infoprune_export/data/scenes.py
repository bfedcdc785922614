"""Procedural scenes: images with known content, and questions whose answers follow from it.

A scene is 112 x 112 pixels, or one of `MIXED_SIZES`, with two to five coloured shapes and, most of the time, a sign
that carries a word or a two-digit number, over a textured background with distractor lines and sensor noise. Questions
cover the kinds of visual question answering that token and head pruning are known to hurt differently: attributes,
counting, existence (as in POPE), relations, position, and reading text (as in TextVQA).

Everything is a function of ``(seed, index)``: image ``i`` of a split is the same whether it is drawn alone or among
thousands, on any machine with the same NumPy and Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 112
# (width, height) in pixels: 60 to 66 cells of 14 x 14, as in a square scene. Among (columns, rows) of cells only the
# square's 8 x 8 divides by 4, so that a tower with windows of 4 x 4 cells has windows cut off at the image border.
MIXED_SIZES = ((112, 112), (126, 98), (98, 126), (140, 84), (84, 140), (154, 84), (84, 154))
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS = {
    "red": (214, 38, 40),
    "green": (44, 160, 58),
    "blue": (38, 72, 222),
    "yellow": (238, 214, 44),
    "purple": (148, 52, 186),
    "cyan": (52, 204, 214),
    "orange": (244, 134, 28),
}
WORDS = ("stop", "exit", "open", "taxi", "shop", "bank", "park", "zoo", "cafe", "bus", "hotel", "gym")

_T = TypeVar("_T")
_SUPERSAMPLING = 2
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Item:
    """One coloured shape; centre and radius in pixels, angle in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Sign:
    """A rectangular sign; centre, width and height in pixels. ``text`` is one of `WORDS` or a number 10..99."""

    text: str
    x: float
    y: float
    width: float
    height: float
    font_size: int
    dark: bool

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """``width`` and ``height`` in pixels."""

    items: tuple[Item, ...]
    sign: Sign | None
    width: int = IMAGE_SIZE
    height: int = IMAGE_SIZE


@dataclass(frozen=True)
class Question:
    """``kind`` is a key of `QUESTION_KINDS`; ``answer`` is lower case, one word or one number."""

    kind: str
    text: str
    answer: str


# ── Composition ──────────────────────────────────────────────────────────────


def compose(rng: np.random.Generator, width: int = IMAGE_SIZE, height: int = IMAGE_SIZE) -> Scene:
    """Draw the content of a scene: first the sign, then shapes that overlap neither it nor each other."""
    boxes: list[tuple[float, float, float, float]] = []
    sign = _compose_sign(rng, width, height) if rng.random() < 0.7 else None
    if sign is not None:
        half_w, half_h = sign.width / 2, sign.height / 2
        boxes.append((sign.x - half_w, sign.y - half_h, sign.x + half_w, sign.y + half_h))
    items: list[Item] = []
    taken: set[tuple[str, str]] = set()
    for _ in range(int(rng.integers(2, 6))):
        placed = _place(rng, boxes, width, height)
        if placed is None:
            continue
        x, y, radius = placed
        free = [(shape, color) for shape in SHAPES for color in COLORS if (shape, color) not in taken]
        shape, color = free[int(rng.integers(len(free)))]
        taken.add((shape, color))
        boxes.append((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1))
        items.append(Item(shape, color, x, y, radius, float(rng.uniform(0, 2 * math.pi))))
    return Scene(tuple(items), sign, width, height)


def _compose_sign(rng: np.random.Generator, scene_width: int, scene_height: int) -> Sign:
    if rng.random() < 0.5:
        text, font_size = str(rng.integers(10, 100)), int(rng.integers(13, 17))
    else:
        text, font_size = WORDS[int(rng.integers(len(WORDS)))], int(rng.integers(11, 14))
    left, top, right, bottom = _font(font_size).getbbox(text)
    width = (right - left) / _SUPERSAMPLING + 6
    height = (bottom - top) / _SUPERSAMPLING + 6
    x = float(rng.uniform(width / 2 + 1, scene_width - width / 2 - 1))
    y = float(rng.uniform(height / 2 + 1, scene_height - height / 2 - 1))
    return Sign(text, x, y, width, height, font_size, dark=bool(rng.random() < 0.5))


def _place(
    rng: np.random.Generator, boxes: list[tuple[float, float, float, float]], width: int, height: int
) -> tuple[float, float, float] | None:
    for _ in range(60):
        radius = float(rng.uniform(6.5, 10.5))
        x, y = float(rng.uniform(radius + 1, width - radius - 1)), float(rng.uniform(radius + 1, height - radius - 1))
        low_x, low_y, high_x, high_y = x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1
        if all(high_x < b[0] or low_x > b[2] or high_y < b[1] or low_y > b[3] for b in boxes):
            return x, y, radius
    return None


# ── Rendering ────────────────────────────────────────────────────────────────


def render(scene: Scene, rng: np.random.Generator, *, plain: bool = False) -> Image.Image:
    """Paint a scene; `rng` decides texture, clutter, colour jitter and noise. Returns an RGB image.

    A `plain` one has none of them, but a background of one colour.
    """
    width, height = scene.width * _SUPERSAMPLING, scene.height * _SUPERSAMPLING
    background = _background(rng, scene.width, scene.height)
    if plain:
        background[:] = background.mean(axis=(0, 1)).astype(np.uint8)
    canvas = Image.fromarray(background).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for _ in range(0 if plain else int(rng.integers(0, 4))):
        grey = int(rng.integers(30, 226))
        x0, y0, x1, y1 = (float(rng.uniform(0, side)) for side in (width, height, width, height))
        draw.line((x0, y0, x1, y1), fill=(grey, grey, grey), width=int(rng.integers(1, 4)))
    for item in scene.items:
        jitter = 0 if plain else rng.normal(0, 12, 3)
        jittered = np.clip(np.array(COLORS[item.color]) + jitter, 0, 255).astype(int)
        _draw_item(draw, item, (int(jittered[0]), int(jittered[1]), int(jittered[2])))
    if scene.sign is not None:
        _draw_sign(draw, scene.sign)
    small = canvas.resize((scene.width, scene.height), Image.Resampling.BOX)
    if plain:
        return small
    pixels = np.asarray(small, np.float32)
    noise = rng.normal(0, rng.uniform(2, 9), (scene.height, scene.width, 1))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """One of five textures: plain, gradient, stripes, checks, clouds. uint8 [height, width, 3]."""
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.ones((height, width, 3), np.float32) * (rng.uniform(70, 190) + rng.normal(0, 10, 3))
    texture = int(rng.integers(0, 5))
    if texture == 1:
        angle = rng.uniform(0, 2 * math.pi)
        ramp = (xx * math.cos(angle) + yy * math.sin(angle)) / max(width, height)
        image += (ramp * rng.uniform(-60, 60))[..., None]
    elif texture == 2:
        angle, period = rng.uniform(0, math.pi), rng.uniform(5, 16)
        wave = np.sin((xx * math.cos(angle) + yy * math.sin(angle)) * 2 * math.pi / period)
        image += (np.sign(wave) * rng.uniform(8, 30))[..., None]
    elif texture == 3:
        period = int(rng.integers(6, 18))
        image += ((((xx // period) + (yy // period)) % 2 * 2 - 1) * rng.uniform(8, 30))[..., None]
    elif texture == 4:
        cells = int(rng.integers(4, 10))
        coarse = Image.fromarray(rng.normal(0, 22, (cells, cells)).astype(np.float32))
        image += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, fill: tuple[int, int, int]) -> None:
    outline = (20, 20, 20)
    x, y, r = (v * _SUPERSAMPLING for v in (item.x, item.y, item.radius))
    box = (x - r, y - r, x + r, y + r)
    if item.shape == "circle":
        draw.ellipse(box, fill=fill, outline=outline, width=2)
    elif item.shape == "ring":
        draw.ellipse(box, outline=outline, width=int(r * 0.5) + 4)
        draw.ellipse((x - r + 2, y - r + 2, x + r - 2, y + r - 2), outline=fill, width=int(r * 0.5))
    else:
        corners = [(x + px * r, y + py * r) for px, py in _polygon(item.shape, item.angle)]
        draw.polygon(corners, fill=fill, outline=outline, width=2)


def _polygon(shape: str, angle: float) -> list[tuple[float, float]]:
    """Unit-radius corners. All but the star are tilted only slightly, so that a square is not a diamond."""
    tilt = (angle % 1 - 0.5) * 0.6
    if shape == "star":
        return [_polar(1.0 if i % 2 == 0 else 0.42, angle + i * math.pi / 5) for i in range(10)]
    if shape == "square":
        return [_polar(1.0, tilt + math.pi / 4 + i * math.pi / 2) for i in range(4)]
    if shape == "triangle":
        return [_polar(1.0, tilt - math.pi / 2 + i * 2 * math.pi / 3) for i in range(3)]
    if shape == "cross":
        arm, reach = math.atan2(0.34, 1.0), math.hypot(0.34, 1.0)
        notch = 0.34 * math.sqrt(2)
        corners = []
        for quarter in range(4):
            turn = tilt + quarter * math.pi / 2
            corners += [_polar(reach, turn - arm), _polar(reach, turn + arm), _polar(notch, turn + math.pi / 4)]
        return corners
    raise ValueError(f"no polygon for shape {shape!r}")


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign) -> None:
    board, ink = ((25, 25, 25), (245, 245, 245)) if sign.dark else ((240, 240, 240), (15, 15, 15))
    x0, y0 = (sign.x - sign.width / 2) * _SUPERSAMPLING, (sign.y - sign.height / 2) * _SUPERSAMPLING
    width, height = sign.width * _SUPERSAMPLING, sign.height * _SUPERSAMPLING
    draw.rectangle((x0, y0, x0 + width, y0 + height), fill=board, outline=ink, width=2)
    font = _font(sign.font_size)
    left, top, right, bottom = font.getbbox(sign.text)
    draw.text((x0 + (width - left - right) / 2, y0 + (height - top - bottom) / 2), sign.text, font=font, fill=ink)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * _SUPERSAMPLING)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


# ── Questions ────────────────────────────────────────────────────────────────


def _unique(items: tuple[Item, ...], attribute: str) -> list[Item]:
    values = [getattr(item, attribute) for item in items]
    return [item for item, value in zip(items, values, strict=True) if values.count(value) == 1]


def _choice(rng: np.random.Generator, options: list[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (options := _unique(scene.items, "shape")):
        return None
    item = _choice(rng, options)
    return f"What color is the {item.shape}?", item.color


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (options := _unique(scene.items, "color")):
        return None
    item = _choice(rng, options)
    return f"What shape is the {item.color} object?", item.shape


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not scene.items:
        return None
    kind = rng.random()
    if kind < 1 / 3:
        return "How many objects are there?", str(len(scene.items))
    attribute, options = ("shape", list(SHAPES)) if kind < 2 / 3 else ("color", list(COLORS))
    present = [getattr(item, attribute) for item in scene.items]
    value = _choice(rng, present if rng.random() < 0.8 else options)
    return f"How many {value} objects are there?", str(present.count(value))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """Half of the answers are no, and most of those mix a colour and a shape that are both in the image."""
    if not scene.items:
        return None
    present = {(item.color, item.shape) for item in scene.items}
    shapes, colors = sorted({s for _, s in present}), sorted({c for c, _ in present})
    yes = bool(rng.random() < 0.5)
    answer = "yes" if yes else "no"
    if rng.random() < 0.5:
        options = shapes if yes else [s for s in SHAPES if s not in shapes]
        return (f"Is there a {_choice(rng, options)} in the image?", answer) if options else None
    if yes:
        color, shape = _choice(rng, sorted(present))
        return f"Is there a {color} {shape} in the image?", answer
    if rng.random() < 0.6:
        pairs = [(c, s) for c in colors for s in shapes if (c, s) not in present]
    else:
        pairs = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present and (c in colors) != (s in shapes)]
    if not pairs:
        return None
    color, shape = _choice(rng, pairs)
    return f"Is there a {color} {shape} in the image?", answer


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    pairs = []
    for a in scene.items:
        for b in scene.items:
            dx, dy = b.x - a.x, b.y - a.y
            if max(abs(dx), abs(dy)) < 16:
                continue  # too close to call
            if abs(dx) > 1.3 * abs(dy):
                pairs.append((a, b, "left" if dx > 0 else "right"))
            elif abs(dy) > 1.3 * abs(dx):
                pairs.append((a, b, "above" if dy > 0 else "below"))
    if not pairs:
        return None
    a, b, direction = _choice(rng, pairs)
    unique = _unique(scene.items, "shape")
    name_a, name_b = (item.shape if item in unique else f"{item.color} {item.shape}" for item in (a, b))
    if rng.random() < 0.6:
        return f"Which direction is the {name_a} from the {name_b}?", direction
    if rng.random() < 0.5:
        return f"Is the {name_a} {direction} the {name_b}?", "yes"
    return f"Is the {name_a} {_OPPOSITE[direction]} the {name_b}?", "no"


def _ask_side(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    options = [item for item in _unique(scene.items, "shape") if abs(item.x - scene.width / 2) > 5]
    if not options:
        return None
    item = _choice(rng, options)
    return f"Which side is the {item.shape} on?", "left" if item.x < scene.width / 2 else "right"


def _ask_text(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if scene.sign is None:
        return None
    return f"What {'number' if scene.sign.is_number else 'word'} is on the sign?", scene.sign.text


QUESTION_KINDS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
    "side": _ask_side,
    "text": _ask_text,
}


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions: one of each kind first, then kinds at random.

    A scene that supports few questions (two equal shapes, no sign) may yield fewer than `count`.
    """
    kinds = list(QUESTION_KINDS)
    questions: dict[str, Question] = {}
    for attempt in range(4 * count):
        if len(questions) == count:
            break
        kind = kinds[attempt] if attempt < len(kinds) else _choice(rng, kinds)
        asked = QUESTION_KINDS[kind](scene, rng)
        if asked is not None and asked[0] not in questions:
            questions[asked[0]] = Question(kind, *asked)
    return list(questions.values())


def mixed_size(seed: int, index: int) -> tuple[int, int]:
    """Width and height, one of `MIXED_SIZES`, of scene `index` of the stream that `seed` names."""
    return MIXED_SIZES[int(np.random.default_rng([seed, index, 2]).integers(len(MIXED_SIZES)))]


def scene_at(
    seed: int, index: int, sizes: Literal["square", "mixed"] = "square", *, plain: bool = False
) -> tuple[Scene, Image.Image]:
    """Scene and image number `index` of the stream that `seed` names; the same scene `plain` or not, see `render`."""
    rng = np.random.default_rng([seed, index])
    width, height = mixed_size(seed, index) if sizes == "mixed" else (IMAGE_SIZE, IMAGE_SIZE)
    scene = compose(rng, width, height)
    return scene, render(scene, rng, plain=plain)
