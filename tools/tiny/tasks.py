r"""Problems with one right answer, in ten kinds, split by a hash for training and testing.

Every prompt is `Q: <question>\nA:` and every answer follows after one space. Nothing here is taken
from a data set: names, words and numbers come from the short lists below, so that a text tells all
that is needed to answer it (only `translate` must be known by heart).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KINDS", "LABELLED", "WORDS", "Problem", "draw", "is_held_out"]

NAMES = [
    "Ann",
    "Bob",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivan",
    "Jane",
    "Kim",
    "Leo",
    "Mia",
    "Nora",
    "Omar",
    "Pia",
]
CITIES = ["Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Kyoto", "Quito", "Dakar", "Bern"]
DRINKS = ["tea", "coffee", "milk", "juice", "water", "cocoa"]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"]
ANIMALS = ["cat", "dog", "fox", "owl", "bear", "wolf", "hare", "crow", "goat", "mole"]
THINGS = ["car", "boat", "lamp", "book", "ring", "drum", "coat", "bell", "rope", "kite"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DICTIONARY = dict(
    zip(
        (*ANIMALS, *THINGS, *COLOURS),
        [
            "gato",
            "perro",
            "zorro",
            "buho",
            "oso",
            "lobo",
            "liebre",
            "cuervo",
            "cabra",
            "topo",
            "coche",
            "barco",
            "luz",
            "libro",
            "anillo",
            "tambor",
            "abrigo",
            "campana",
            "cuerda",
            "cometa",
            "rojo",
            "azul",
            "verde",
            "negro",
            "blanco",
            "marron",
            "gris",
            "rosa",
        ],
        strict=True,
    )
)
_TEMPLATE = (
    "Dear {to}, thank you for your letter about the {colour} {thing}. I will be in {city} on {day} and bring it with me. "
    "Please keep the {animal} at home until then. Best wishes from {city}, {sender}."
)
_TEMPLATE_WORDS = [
    "Dear",
    "Thank",
    "thank",
    "you",
    "for",
    "your",
    "letter",
    "about",
    "the",
    "I",
    "will",
    "be",
    "in",
    "on",
    "and",
    "bring",
    "it",
    "with",
    "me",
    "Please",
    "keep",
    "at",
    "home",
    "until",
    "then",
    "Best",
    "wishes",
    "from",
    "to",
    "is",
    "lives",
    "likes",
    "age",
    "name",
    "city",
    "drink",
    "sort",
    "reverse",
    "only",
    "animals",
    "spanish",
    "count",
    "by",
    "up",
    "down",
    "has",
    "old",
    "years",
    "add",
    "table",
    "json",
    "repeat",
    "write",
    "says",
    "how",
    "many",
    "much",
    "first",
]
WORDS = sorted(
    {
        *NAMES,
        *CITIES,
        *DRINKS,
        *ANIMALS,
        *THINGS,
        *COLOURS,
        *DAYS,
        *DICTIONARY.values(),
        *_TEMPLATE_WORDS,
    }
)
"""Every word of the problems; the tokenizer knows them whole."""


Size = Callable[[int, int], int]
"""Chooses how long a problem is, given the shortest and longest of training."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A kind of task, a prompt and its one right answer (without the space before it)."""

    kind: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """Prompt and answer as they are trained on."""
        return f"{self.prompt} {self.answer}"


def draw(
    rng: random.Random,
    *,
    held_out: bool,
    kind: str | None = None,
    shots: int = 0,
    beyond: bool = False,
) -> Problem:
    """One random problem.

    Args:
        rng: The source of randomness.
        held_out: Draw from the problems that training never sees, or only from those it may see.
        kind: One of `KINDS` or `LABELLED`, None for any of `KINDS`.
        shots: Solved problems of the same kind in front of the question.
        beyond: Make it shorter or longer than any problem of training.
    """
    kind = kind or rng.choice(sorted(KINDS))
    question, answer = _until(rng, kind, held_out, _beyond(rng) if beyond else rng.randint)
    examples = [_until(rng, kind, False, rng.randint) for _ in range(shots)]
    before = "".join(f"Q: {q}\nA: {a}\n" for q, a in examples)
    return Problem(kind, f"{before}Q: {question}\nA:", answer)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the twentieth of all questions that is kept from training."""
    return hashlib.sha256(question.encode()).digest()[0] < 13


def _beyond(rng: random.Random) -> Size:
    """A fifth of the trained range shorter than its shortest, or longer than its longest; the same way for all sizes of one problem."""
    longer = rng.random() < 0.5
    return lambda low, high: (
        (high + max(1, (high - low) // 5)) if longer else (low - max(1, (high - low) // 5))
    )


def _until(rng: random.Random, kind: str, held_out: bool, size: Size) -> tuple[str, str]:
    while True:
        question, answer = {**KINDS, **LABELLED}[kind](rng, size)
        if is_held_out(question) is held_out:
            return question, answer


def _json(rng: random.Random, size: Size) -> tuple[str, str]:
    """Extraction of two or three people from prose."""
    people = [
        {
            "name": name,
            "age": rng.randint(20, 99),
            "city": rng.choice(CITIES),
            "drink": rng.choice(DRINKS),
        }
        for name in rng.sample(NAMES, size(2, 3))
    ]
    prose = " ".join(
        f"{p['name']} is {p['age']} years old, lives in {p['city']} and likes {p['drink']}."
        for p in people
    )
    return f"json: {prose}", json.dumps(people)


def _letter(rng: random.Random, size: Size) -> tuple[str, str]:
    """A letter with seven slots."""
    to, sender = rng.sample(NAMES, 2)
    slots = {"to": to, "sender": sender, "colour": rng.choice(COLOURS), "thing": rng.choice(THINGS)}
    slots |= {"city": rng.choice(CITIES), "day": rng.choice(DAYS), "animal": rng.choice(ANIMALS)}
    question = "write from {sender} to {to}: {colour} {thing}, {city}, {day}, {animal}".format(
        **slots
    )
    return question, _TEMPLATE.format(**slots)


def _reverse(rng: random.Random, size: Size) -> tuple[str, str]:
    """Words in the opposite order."""
    words = rng.choices([*ANIMALS, *THINGS, *COLOURS], k=size(16, 30))
    return f"reverse: {' '.join(words)}", " ".join(reversed(words))


def _sort(rng: random.Random, size: Size) -> tuple[str, str]:
    """Distinct letters in the order of the alphabet."""
    letters = rng.sample(LETTERS, size(14, 22))
    return f"sort: {' '.join(letters)}", " ".join(sorted(letters))


def _lookup(rng: random.Random, size: Size) -> tuple[str, str]:
    """Ages from a table, asked in another order."""
    ages = {name: rng.randint(20, 99) for name in rng.sample(NAMES, size(5, 8))}
    asked = rng.sample(sorted(ages), min(len(ages), size(4, 7)))
    table = ", ".join(f"{name} {age}" for name, age in ages.items())
    return f"table: {table}. how old: {' '.join(asked)}", " ".join(
        f"{name} is {ages[name]} years old." for name in asked
    )


def _add(rng: random.Random, size: Size) -> tuple[str, str]:
    """Sums of two numbers of two digits below 100."""
    pairs = [(rng.randint(10, 49), rng.randint(10, 49)) for _ in range(size(4, 8))]
    return f"add: {', '.join(f'{a}+{b}' for a, b in pairs)}", ", ".join(
        f"{a}+{b}={a + b}" for a, b in pairs
    )


def _animals(rng: random.Random, size: Size) -> tuple[str, str]:
    """The animals of a list, in its order."""
    words = [
        rng.choice(ANIMALS if rng.random() < 0.7 else [*THINGS, *COLOURS])
        for _ in range(size(24, 40))
    ]
    kept = [word for word in words if word in ANIMALS]
    return f"only animals: {' '.join(words)}", " ".join(kept) or "no"


def _translate(rng: random.Random, size: Size) -> tuple[str, str]:
    """Word by word into Spanish."""
    words = rng.choices(list(DICTIONARY), k=size(20, 40))
    return f"spanish: {' '.join(words)}", " ".join(DICTIONARY[word] for word in words)


def _count(rng: random.Random, size: Size) -> tuple[str, str]:
    """An arithmetic progression of two-digit numbers."""
    step, length = rng.randint(1, 4), size(10, 20)
    first = rng.randint(10, 99 - step * (length - 1))
    numbers = [first + step * i for i in range(length)]
    if rng.random() < 0.5:
        return f"count up from {numbers[0]} by {step} to {numbers[-1]}", " ".join(map(str, numbers))
    return f"count down from {numbers[-1]} by {step} to {numbers[0]}", " ".join(
        map(str, reversed(numbers))
    )


def _repeat(rng: random.Random, size: Size) -> tuple[str, str]:
    """Words as often as their numbers say."""
    runs = [(rng.randint(2, 6), word) for word in rng.sample([*ANIMALS, *THINGS], size(6, 9))]
    return f"repeat: {', '.join(f'{n} {word}' for n, word in runs)}", " ".join(
        " ".join([word] * n) for n, word in runs
    )


KINDS: dict[str, Callable[[random.Random, Size], tuple[str, str]]] = {
    "add": _add,
    "animals": _animals,
    "count": _count,
    "json": _json,
    "letter": _letter,
    "lookup": _lookup,
    "repeat": _repeat,
    "reverse": _reverse,
    "sort": _sort,
    "translate": _translate,
}


def _labelled(items: list[str]) -> str:
    return " ".join(f"{label} {item}" for label, item in zip(LETTERS, items, strict=False))


def _sums(rng: random.Random, size: Size) -> tuple[str, str]:
    """Sums of two numbers of two digits below 100, each under its letter."""
    pairs = [(rng.randint(10, 49), rng.randint(10, 49)) for _ in range(size(8, 16))]
    return f"sums: {_labelled([f'{a}+{b}' for a, b in pairs])}", _labelled(
        [str(a + b) for a, b in pairs]
    )


def _flip(rng: random.Random, size: Size) -> tuple[str, str]:
    """Labelled words from the last to the first."""
    words = _labelled(rng.choices([*ANIMALS, *THINGS, *COLOURS], k=size(10, 20))).split()
    return f"flip: {' '.join(words)}", " ".join(
        f"{words[i]} {words[i + 1]}" for i in range(len(words) - 2, -1, -2)
    )


def _words(rng: random.Random, size: Size) -> tuple[str, str]:
    """Labelled words in Spanish."""
    words = rng.choices(list(DICTIONARY), k=size(12, 22))
    return f"words: {_labelled(words)}", _labelled([DICTIONARY[word] for word in words])


LABELLED: dict[str, Callable[[random.Random, Size], tuple[str, str]]] = {
    "flip": _flip,
    "sums": _sums,
    "words": _words,
}
"""Kinds whose items carry letters. What stands at a place of the answer can be looked up there without counting all before it."""
