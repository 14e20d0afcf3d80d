"""The caption grammar: concept × style × background, written in several ways and read back.

    a 3d render of a fox on a teal background          the canonical form, in which models are asked
    fox, flat icon, teal background, animal, face      one of the others, with the concept's tags

A caption names three factors that a picture can be checked for. One that names no background means white.
"""

import random
import re
from dataclasses import dataclass

STYLES = {
    "3d": ("3d render", "shiny 3d model"),
    "flat": ("flat icon", "flat drawing"),
    "outline": ("outline drawing", "line icon"),
}
"""Style → its names in a caption, the canonical one first. "outline" exists only where OpenMoji was added."""

COLOURS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (136, 136, 136),
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 220, 60),
    "lime": (160, 214, 50),
    "green": (34, 139, 60),
    "teal": (16, 128, 128),
    "cyan": (90, 214, 232),
    "blue": (40, 96, 220),
    "navy": (20, 32, 92),
    "purple": (124, 58, 190),
    "pink": (248, 150, 190),
    "brown": (120, 72, 36),
    "beige": (236, 220, 186),
}
"""Background colours in sRGB; any two differ by at least 50 of 255 in one channel."""

DEFAULT_COLOUR = "white"

# a_style, a_concept and a_colour have their articles
_WITH_COLOUR = (
    "{a_style} of {a_concept} on {a_colour} background",
    "{style} of {a_concept} on {a_colour} background",
    "{a_style} of {a_concept} on {colour}",
    "{a_concept} on {a_colour} background, {style}",
    "{concept}, {style}, {colour} background",
)
_WITHOUT = ("{a_style} of {a_concept}", "{style} of {a_concept}", "{a_concept}, {style}", "{concept}, {style}")

_STYLE_OF = {name: style for style, names in STYLES.items() for name in names}
_ANY_STYLE, _ANY_COLOUR = "|".join(_STYLE_OF), "|".join(COLOURS)
_MAIN = re.compile(
    rf"(?:(?:an? )?(?P<style>{_ANY_STYLE}) of )?(?P<concept>.+?)(?: on (?:an? )?(?P<colour>{_ANY_COLOUR})(?: background)?)?"
)


@dataclass(frozen=True)
class Factors:
    """What a caption says."""

    concept: str
    style: str
    colour: str
    tags: tuple[str, ...] = ()


def canonical(concept: str, style: str, colour: str | None = None) -> str:
    """The form in which a model is asked for a picture; without a colour the background is white."""
    return _write((_WITHOUT if colour is None else _WITH_COLOUR)[0], concept, STYLES[style][0], colour)


def sample(rng: random.Random, factors: Factors) -> str:
    """One of the ways to say `factors`: half of them canonical in form, a quarter with up to three of the tags."""
    named = factors.colour != DEFAULT_COLOUR or rng.random() < 0.5
    forms = _WITH_COLOUR if named else _WITHOUT
    form = forms[0] if rng.random() < 0.5 else rng.choice(forms)
    names = STYLES[factors.style]
    style = names[0] if rng.random() < 0.75 else rng.choice(names)
    text = _write(form, factors.concept, style, factors.colour)
    if factors.tags and rng.random() < 0.25:
        text = ", ".join([text, *rng.sample(factors.tags, rng.randint(1, min(3, len(factors.tags))))])
    return text


def parse(text: str) -> Factors:
    """The factors of a caption of this grammar. Raises ValueError where it names no style."""
    main, *rest = text.split(", ")
    found = _MAIN.fullmatch(main)
    style, colour, tags = found["style"], found["colour"], []
    for part in rest:
        if part in _STYLE_OF and style is None:
            style = part
        elif colour is None and part.endswith(" background") and part.removesuffix(" background") in COLOURS:
            colour = part.removesuffix(" background")
        else:
            tags.append(part)
    if style is None:
        raise ValueError(f"{text!r} names no style; the styles are {', '.join(_STYLE_OF)}")
    concept = re.sub(r"^an? ", "", found["concept"])
    return Factors(concept, _STYLE_OF[style], colour or DEFAULT_COLOUR, tuple(tags))


def clean(label: str) -> str:
    """A label of the data as a caption can hold it: lower case, no comma or colon, straight quotes."""
    label = label.lower().replace("’", "'").replace("“", '"').replace("”", '"')
    return re.sub(r"\s+", " ", label.replace(": ", " with ").replace(",", " and")).strip()


def with_article(noun: str) -> str:
    """`a fox`, `an owl`, and `glasses`: a plural takes none."""
    head = re.split(r" (?:with|without|on|in|of|and|at) ", noun)[0]
    if re.search(r"[^sui]s$|skis$", head):
        return noun
    vowel = re.match(r"[aeiou]", noun) and not re.match(r"one\b|uni|eu|use", noun)
    return f"{'an' if vowel else 'a'} {noun}"


def _write(form: str, concept: str, style: str, colour: str | None) -> str:
    words = {"concept": concept, "style": style, "colour": colour or ""}
    return form.format(**words, **{f"a_{name}": with_article(word) for name, word in words.items()})
