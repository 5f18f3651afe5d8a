"""Pictures of coloured shapes, and questions about them with true answers.

A `Scene` holds one to four things on a canvas measured in cells. One cell is what becomes one image token of the
model (16 x 16 pixels), so a scene has the same layout at every resolution it is drawn at. `ask` puts a question whose
answer follows from the scene and from nothing else: "What colour is the star?" is asked only when there is one star.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 212, 30),
    "green": (40, 150, 60),
    "blue": (35, 85, 205),
    "purple": (135, 45, 160),
}
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("shape", "colour", "count", "count some", "position", "existence")


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    x: float  # centre, in cells from the left
    y: float  # centre, in cells from the top
    radius: float  # of the circle around it, in cells
    tilt: float = 0.0  # radians
    rgb: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    columns: int
    rows: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


# Scenes


def make_scene(rng: random.Random, columns: int, rows: int) -> Scene:
    """One to four things that do not touch each other, on a tinted background."""
    number = rng.randint(1, 4)
    colours = rng.sample(list(COLOURS), rng.randint(1, 4))
    shapes = rng.sample(SHAPES, rng.randint(1, 4))
    shrink = 1.0
    while (places := place(rng, columns, rows, number, shrink)) is None:
        shrink *= 0.93
    things = [make_thing(rng, rng.choice(shapes), rng.choice(colours), *at) for at in places]
    return Scene(columns, rows, make_background(rng), tuple(things))


def make_thing(rng: random.Random, shape: str, colour: str, x: float, y: float, radius: float) -> Thing:
    rgb = tuple(max(0, min(255, round(c + rng.uniform(-14, 14)))) for c in COLOURS[colour])
    return Thing(shape, colour, x, y, radius, rng.uniform(-0.15, 0.15), rgb)


def make_background(rng: random.Random) -> tuple[int, int, int]:
    """Near white with a tint, or (one in four) near black."""
    level = rng.uniform(222, 255) if rng.random() < 0.75 else rng.uniform(12, 48)
    return tuple(max(0, min(255, round(level + rng.uniform(-12, 12)))) for _ in range(3))


def place(rng: random.Random, columns: int, rows: int, number: int, shrink: float) -> list | None:
    """Centres and radii, or None where the things did not fit. The first thing is at times put in the centre."""
    places = []
    largest = min(1.35, 0.32 * min(columns, rows))
    for index in range(number):
        for _ in range(20):
            radius = max(0.72, rng.uniform(0.72, largest) * shrink)
            x = rng.uniform(radius + 0.06, columns - radius - 0.06)
            y = rng.uniform(radius + 0.06, rows - radius - 0.06)
            if index == 0 and rng.random() < 0.25:
                x, y = columns * rng.uniform(0.45, 0.55), rows * rng.uniform(0.45, 0.55)
            if all(math.hypot(x - a, y - b) > radius + r + 0.12 for a, b, r in places):
                places.append((x, y, radius))
                break
        else:
            return None
    return places


def zone(scene: Scene, thing: Thing) -> str | None:
    """The quarter a thing lies in, or "centre"; None where a person might hesitate."""
    u, v = thing.x / scene.columns - 0.5, thing.y / scene.rows - 0.5
    if max(abs(u), abs(v)) < 0.06:
        return "centre"
    if min(abs(u), abs(v)) < 0.10:
        return None
    return f"{'top' if v < 0 else 'bottom'} {'left' if u < 0 else 'right'}"


def plain(shape: str, colour: str, x: float, y: float, radius: float, tilt: float) -> Thing:
    return Thing(shape, colour, x, y, radius, tilt, COLOURS[colour])


DEMO = Scene(
    8,
    6,
    (250, 246, 238),
    (
        plain("square", "blue", 1.75, 1.70, 1.18, 0.10),
        plain("circle", "yellow", 5.95, 1.55, 1.15, 0.0),
        plain("triangle", "green", 2.30, 4.40, 1.25, -0.08),
        plain("star", "red", 6.20, 4.20, 1.32, 0.12),
    ),
)
DEMO2 = Scene(
    7,
    6,
    (26, 28, 40),
    (
        plain("star", "yellow", 1.90, 1.95, 1.30, -0.10),
        plain("circle", "orange", 5.20, 1.50, 0.95, 0.0),
        plain("square", "blue", 4.80, 4.30, 1.25, 0.06),
    ),
)


# Drawing


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The corners of a thing around (0, 0), in cells."""
    if thing.shape == "square":
        corners = [(45 + 90 * k, 0.98) for k in range(4)]
    elif thing.shape == "triangle":
        corners = [(-90 + 120 * k, 1.0) for k in range(3)]
    elif thing.shape == "star":
        corners = [(-90 + 36 * k, 0.42 if k % 2 else 1.0) for k in range(10)]
    else:
        corners = [(5 * k, 0.86) for k in range(72)]
    turned = [(math.radians(angle) + thing.tilt, thing.radius * length) for angle, length in corners]
    return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in turned]


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an antialiased RGB picture of any size."""
    fine = max(2, math.ceil(3 * 16 * scene.columns / width))
    picture = Image.new("RGB", (width * fine, height * fine), scene.background)
    paint(picture, scene, [thing.rgb for thing in scene.things])
    return picture.reduce(fine)


def draw_demo(scene: Scene, cell: int) -> Image.Image:
    """A large picture for people to look at."""
    size = (scene.columns * cell, scene.rows * cell)
    return draw(scene, 4 * size[0], 4 * size[1]).reduce(4)


def draw_owners(scene: Scene, width: int, height: int) -> Image.Image:
    """For each pixel, 0 or 1 + the index of the thing that covers it."""
    owners = Image.new("L", (width, height), 0)
    paint(owners, scene, range(1, len(scene.things) + 1))
    return owners


def paint(picture: Image.Image, scene: Scene, inks) -> None:
    canvas = ImageDraw.Draw(picture)
    sx, sy = picture.width / scene.columns, picture.height / scene.rows
    for thing, ink in zip(scene.things, inks, strict=True):
        canvas.polygon([((thing.x + x) * sx, (thing.y + y) * sy) for x, y in outline(thing)], fill=ink)


# Questions


def ask(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """A question of that kind, or None where this scene admits none."""
    return ASKERS[kind](rng, scene)


def ask_any(rng: random.Random, scene: Scene, kinds=KINDS) -> Question:
    while (question := ask(rng, scene, rng.choice(kinds))) is None:
        pass
    return question


def in_picture(question: Question, index: int) -> Question:
    """The same question where there are several pictures."""
    where = f" in the {('first', 'second')[index]} picture?"
    return replace(question, text=question.text.replace("?", where))


def only(scene: Scene, **wanted) -> list[Thing]:
    """The things with these attributes."""
    return [t for t in scene.things if all(getattr(t, name) == value for name, value in wanted.items())]


def ask_shape(rng, scene):
    singles = [t for t in scene.things if len(only(scene, colour=t.colour)) == 1]
    if not singles:
        return None
    thing = rng.choice(singles)
    phrase = rng.choice(("what shape is the {0} object?", "what shape is the {0} one?", "which shape is {0}?"))
    return Question("shape", phrase.format(thing.colour), thing.shape)


def ask_colour(rng, scene):
    singles = [t for t in scene.things if len(only(scene, shape=t.shape)) == 1]
    if not singles:
        return None
    thing = rng.choice(singles)
    phrase = rng.choice(("what colour is the {0}?", "what color is the {0}?", "which colour does the {0} have?"))
    return Question("colour", phrase.format(thing.shape), thing.colour)


def ask_count(rng, scene):
    phrase = rng.choice(("how many objects are there?", "how many objects do you see?", "how many shapes are there?"))
    return Question("count", phrase, NUMBERS[len(scene.things)])


def ask_count_some(rng, scene):
    """Of one colour or one shape. Two times in three one that is there, so that "zero" is not the usual answer."""
    attribute, values = rng.choice((("colour", list(COLOURS)), ("shape", SHAPES)))
    present = rng.random() < 0.67
    value = getattr(rng.choice(scene.things), attribute) if present else rng.choice(values)
    noun = f"{value} objects" if attribute == "colour" else f"{value}s"
    phrase = rng.choice(("how many {0} are there?", "how many {0} do you see?"))
    return Question("count some", phrase.format(noun), NUMBERS[len(only(scene, **{attribute: value}))])


def ask_position(rng, scene):
    """Named by colour and shape, or by one of them where that is enough."""
    clear = [t for t in scene.things if zone(scene, t) and len(only(scene, colour=t.colour, shape=t.shape)) == 1]
    if not clear:
        return None
    thing = rng.choice(clear)
    names = [f"{thing.colour} {thing.shape}"]
    if len(only(scene, shape=thing.shape)) == 1:
        names.append(thing.shape)
    if len(only(scene, colour=thing.colour)) == 1:
        names.append(f"{thing.colour} object")
    return Question("position", f"where is the {rng.choice(names)}?", zone(scene, thing))


def ask_existence(rng, scene):
    """About half the answers are yes. A "no" often shares its colour or its shape with a thing that is there."""
    thing = rng.choice(scene.things)
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.7:
        colour = rng.choice(list(COLOURS)) if rng.random() < 0.75 else colour
        shape = rng.choice(SHAPES) if rng.random() < 0.75 else shape
    article = "an" if colour == "orange" else "a"
    phrase = rng.choice(("is there {0} {1} {2}?", "do you see {0} {1} {2}?"))
    answer = "yes" if only(scene, colour=colour, shape=shape) else "no"
    return Question("existence", phrase.format(article, colour, shape), answer)


ASKERS = {
    "shape": ask_shape,
    "colour": ask_colour,
    "count": ask_count,
    "count some": ask_count_some,
    "position": ask_position,
    "existence": ask_existence,
}
