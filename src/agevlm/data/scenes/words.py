"""English for the grounded scenes: articles, plurals, lists, positions, and the words painted on signs."""

from collections.abc import Sequence


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Short common words that name no object of the icon table, so that reading a sign is never answered by its picture.
SIGN_WORDS = tuple(
    "able above again air also area away back bank base best big blue bold both busy calm care cash city clean clear "
    "close club cold cool copy cost dark data date deal deep desk diet done down dream dry early earth east easy edge "
    "empty end enjoy enter even event exit extra face fact fair fall fame farm fast field final fine first five flow "
    "focus food form free fresh front full fun game gate glad goal gold good grand great green grow guide half happy "
    "hard help hero high hill hope hot hour idea inside jazz join joy jump just keep kind king lake land large last "
    "late lead learn left less level life lift light lime line list live local long look loud love low lucky lunch "
    "magic main major map mark max media menu mile milk mind mint mix money more move music near new next nice night "
    "north now ocean odd off office old only open other out over own page park part party pass past peace pink place "
    "plan play plus point pool port power press price prime pull pure push queen quick quiet quiz race rain rapid "
    "read ready real red rest rich ride right rise river road rock room round royal rush safe sale salt same save "
    "sea seat send seven shop short show side sign silk simple slow small smart smile snow soft solid song soon "
    "sound south space speed sport spring staff start stay still stop storm story sugar super sure sweet swim table "
    "take talk taste team thank think three tide time tiny today top total touch tour town trade travel trip true "
    "trust turn unit upper urban value view visit voice vote wait walk wall warm wash water wave way week well west "
    "white wide wild wind wine wise wish wood word work world yes young zone".upper().split()
)

_AN = frozenset({"hourglass", "hour", "heirloom"})
_A_DESPITE_VOWEL = ("uni", "use", "usb", "ufo", "eu", "one", "ukulele", "ute")
_IRREGULAR_PLURALS = {
    "mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen", "person": "people",
    "man": "men", "woman": "women", "child": "children", "die": "dice", "leaf": "leaves", "knife": "knives",
    "wolf": "wolves", "calf": "calves", "loaf": "loaves", "shelf": "shelves", "scarf": "scarves", "half": "halves",
    "sheep": "sheep", "deer": "deer", "moose": "moose", "bison": "bison", "squid": "squid",
    "shrimp": "shrimp", "aircraft": "aircraft", "cactus": "cacti", "potato": "potatoes", "tomato": "tomatoes",
    "mango": "mangoes", "buffalo": "buffaloes", "mosquito": "mosquitoes", "volcano": "volcanoes",
}  # fmt: skip

_POSITIONS = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


def article(noun: str) -> str:
    """The article "a" or "an", by the sound `noun` starts with."""
    first = noun.split()[0].lower()
    if first in _AN:
        return "an"
    return "an" if first[0] in "aeiou" and not first.startswith(_A_DESPITE_VOWEL) else "a"


def with_article(noun: str) -> str:
    return f"{article(noun)} {noun}"


def plural(noun: str) -> str:
    """Plural of a singular noun phrase whose last word is the head ("pine tree" -> "pine trees")."""
    *rest, head = noun.split()
    if head in _IRREGULAR_PLURALS:
        head = _IRREGULAR_PLURALS[head]
    elif head.endswith("fish"):
        pass
    elif head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return " ".join([*rest, head])


def join_phrases(phrases: Sequence[str]) -> str:
    """Joins phrases as "a", "a and b" or "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def position(x: float, y: float) -> str:
    """The words for a place in the picture; x and y run from 0 (left, top) to 1 (right, bottom)."""
    return _POSITIONS[cell(y)][cell(x)]


def cell(value: float) -> int:
    """Third of the picture (0, 1 or 2) that a coordinate between 0 and 1 falls into."""
    return min(2, max(0, int(value * 3)))


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
