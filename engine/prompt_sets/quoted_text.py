"""Prompts that ask for a text in the picture, each with exactly one text in quotation marks."""

from collections.abc import Callable

from . import Kind, Record

SCENES = (
    'a wooden sign that says "{}"',
    'a neon sign with the text "{}"',
    'a shop window with "{}" painted on the glass',
    'a birthday cake with "{}" written in icing',
    'a coffee mug with "{}" printed on it',
    'a blackboard with "{}" written in chalk',
    'a t-shirt with the text "{}" on the front',
    'a street sign that reads "{}"',
    'a book with the title "{}" on its cover',
    'a movie poster with the title "{}"',
    'a brick wall with "{}" sprayed on it',
    'a paper note that says "{}"',
    'a billboard beside a road that reads "{}"',
    'a robot holding a card that says "{}"',
    'a cardboard box with "{}" stamped on its side',
    'a bottle with a label that reads "{}"',
    'a train station display that shows "{}"',
    'a flag with the text "{}"',
    'a computer screen that shows "{}"',
    'a newspaper with the headline "{}"',
    'a tote bag with "{}" printed on it',
    'a boat with "{}" painted on its bow',
    'a stone arch with "{}" carved into it',
    'a postcard with "{}" across the sky',
)
WORDS = (
    *("Open", "Welcome", "Hello", "Coffee", "Library", "Garden", "Bakery", "Museum", "Exit", "Sale", "Harbour"),
    *("Market", "Music", "Summer", "Winter", "Monday", "Adventure", "Dream", "Energy", "Galaxy", "Honey", "Island"),
    *("Journey", "Kitchen", "Lemon", "Mountain", "Night", "Ocean", "Paradise", "Quiet", "River", "Sunrise", "Theatre"),
    *("Umbrella", "Victory", "Wonder", "Yellow", "Zebra", "Bicycle", "Castle"),
)
FIRST = ("Big", "Blue", "Bright", "Fresh", "Golden", "Green", "Happy", "Little", "Lost", "Lucky", "New", "Old", "Quiet")
SECOND = ("Bread", "Bridge", "Cat", "Day", "Forest", "Fox", "House", "Moon", "Road", "Star", "Street", "Tree", "World")
PHRASES = (
    *("Please knock first", "Back in ten minutes", "Do not feed the birds", "Made with love", "Open all night"),
    *("Mind the step", "No parking today", "The future is near", "Never stop learning", "Best friends forever"),
    *("Keep the door shut", "Happy birthday Anna", "One day at a time", "Water the plants", "Wish you were here"),
    *("Good things take time", "Hot soup inside", "Two for one", "See you next year", "We are hiring"),
    *(
        "Ask me anything",
        "Fragile handle with care",
        "All you can eat",
        "Welcome to the jungle",
        "Under new management",
    ),
)
LABELS = ("Room", "Gate", "Bus", "Track", "Route", "Level", "Table", "Chapter", "Locker", "Flight")
NUMBERS = range(2, 100)


def kind(tag: str, weight: float, num_texts: int, text: Callable[[int], str]) -> Kind:
    """Every text in every scene."""

    def make(number: int) -> Record:
        which, scene = divmod(number, len(SCENES))
        return {"tag": tag, "text": text(which), "prompt": SCENES[scene].format(text(which))}

    return Kind(weight, num_texts * len(SCENES), make)


def two_words(number: int) -> str:
    """Such as ``Golden Fox``."""
    first, second = divmod(number, len(SECOND))
    return f"{FIRST[first]} {SECOND[second]}"


def label(number: int) -> str:
    """Such as ``Gate 27``."""
    which, value = divmod(number, len(NUMBERS))
    return f"{LABELS[which]} {NUMBERS[value]}"


KINDS = {
    "word": kind("word", 1, len(WORDS), WORDS.__getitem__),
    "two_words": kind("two_words", 1, len(FIRST) * len(SECOND), two_words),
    "number": kind("number", 1, len(LABELS) * len(NUMBERS), label),
    "phrase": kind("phrase", 1, len(PHRASES), PHRASES.__getitem__),
}
