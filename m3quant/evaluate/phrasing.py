"""How facts and questions are worded, and the keys and values in them. Torch-free.

`RULER` follows the wording of RULER's needle tasks (arXiv:2404.06654; NVIDIA/RULER, Apache-2.0), in which the question is put
in prose and the answer is begun. `CODE` is one plain sentence that the question repeats up to the value: any language
model can complete it, and the trained fixtures know it.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_ADJECTIVES = """amber ancient awake bitter bold brave bright broad calm careful clever cold cool curious damp dark
deep distant dry dull eager early elegant empty fair faint famous fast fierce fine firm flat fond frank free fresh full
gentle glad golden grand gray great green happy hard heavy hidden hollow honest humble idle keen kind large late lazy
light little lively local lonely long loud loyal lucky mild modern narrow neat new noble odd old open pale patient plain
polite prompt proud pure quick quiet rapid rare ready rich ripe rough round rural sad safe sharp short shy silent silver
simple sleepy slow small smooth soft solid sour steady steep stern still strange strong sudden sunny sweet swift tall
tame tender thick thin tidy tiny true vast vivid warm weak wet white wide wild wise young"""
_NOUNS = """anchor apple arrow attic badge bakery banner barn basket beach bell bench bird blanket boat book border
bottle branch bridge broom brush bucket button cabin camel candle canyon carpet castle cave cellar chair chapel circle
city clock cloud coat copper corner cottage cradle creek crown curtain desert desk door dragon drum eagle engine farm
feather fence ferry field fire flag flute forest fountain fox garden gate glove hammer harbor hill horse hotel house
island jacket jewel kettle king kitchen knight ladder lake lamp lantern leaf letter library lion market meadow mill
mirror moon mountain museum needle ocean orchard oven owl palace paper path pencil piano pillow pocket pond prince
queen rabbit raven ribbon ring river road rocket roof rope sail saddle school shadow ship shore silk spoon spring stable
star station stone street sword table temple tent tiger tower tree tunnel valley village violin wagon wall watch
whistle window winter wolf yard"""
# The fixtures are trained on these words (tests/training/needles.py) and know no others.
_CODE_ADJECTIVES = """amber brave calm clever cold dark early empty faint fast fine fresh gentle golden grand green
happy heavy hidden honest large little lucky narrow noble old pale quiet rapid silver small strange"""
_CODE_NOUNS = """apple bird boat book bridge castle city clock cloud door field fire forest garden hill horse house island
king lake letter market mirror moon mountain queen river road ship stone tower tree"""

_PLACEHOLDERS = {
    "fact": ("key", "value", "kind"),
    "intro": ("kind",),
    "many_intro": ("kind",),
    "question": ("key", "keys", "kind"),
    "many_question": ("key", "keys", "kind"),
}


class Phrasing(BaseModel):
    """Templates: {key}, {value}; {keys} in a question about several; a value follows the question after a space.

    Every template is text of its own, tokenized apart: write the line breaks that belong to it. `many_*`: the wording
    when more than one value is asked for (the single one's if empty). A key is an adjective and a noun.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    intro: str = ""
    fact: str
    question: str
    many_intro: str = ""
    many_question: str = ""
    separator: str = ","
    last_separator: str | None = None
    word_join: str = " "
    adjectives: tuple[str, ...] = Field(default=tuple(_ADJECTIVES.split()), min_length=1)
    nouns: tuple[str, ...] = Field(default=tuple(_NOUNS.split()), min_length=1)
    digits: int = Field(default=5, ge=1, le=18)

    @field_validator(*_PLACEHOLDERS)
    @classmethod
    def _fills(cls, template: str, info: ValidationInfo) -> str:
        names = _PLACEHOLDERS[str(info.field_name)]
        try:
            template.format(**dict.fromkeys(names, "1"))
        except (KeyError, IndexError, AttributeError, ValueError):
            known = ", ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"the placeholders here are {known}; any other brace is written twice") from None
        return template

    @field_validator("fact")
    @classmethod
    def _states_both(cls, fact: str) -> str:
        if "{key}" not in fact or "{value}" not in fact:
            raise ValueError("the fact must contain {key} and {value}")
        return fact

    @field_validator("question")
    @classmethod
    def _ends_open(cls, question: str) -> str:
        if "{key}" not in question and "{keys}" not in question:
            raise ValueError("the question must contain {key}")
        if question != question.rstrip():
            raise ValueError("the question must not end in white space: a space belongs to the value that follows")
        return question

    @property
    def pairs(self) -> int:
        """How many keys there are."""
        return len({f"{adjective}{self.word_join}{noun}" for adjective in self.adjectives for noun in self.nouns})

    def state(self, key: str, value: str) -> str:
        return self.fact.format(key=key, value=value, kind=_kind(value))

    def opening(self, values: Sequence[str]) -> str:
        text = self.many_intro if len(values) > 1 and self.many_intro else self.intro
        return text.format(kind=_kind(values[0]))

    def ask(self, keys: Sequence[str], values: Sequence[str]) -> str:
        many = len(values) > 1 and self.many_question
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        return (self.many_question if many else self.question).format(key=named, keys=named, kind=_kind(values[0]))


def _kind(value: str) -> str:
    return "number" if value.isdigit() else "uuid"


CODE = Phrasing(
    fact="\nThe secret code of the {key} is {value}.\n",
    question="\nThe secret code of the {key} is",
    adjectives=tuple(_CODE_ADJECTIVES.split()),
    nouns=tuple(_CODE_NOUNS.split()),
)
RULER = Phrasing(
    intro="A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    fact=" One of the special magic {kind}s for {key} is: {value}. ",
    question="\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is",
    many_intro="Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n",
    many_question="\nWhat are all the special magic {kind}s for {key} mentioned in the provided text?"
    " The special magic {kind}s for {key} mentioned in the provided text are",
    word_join="-",
    digits=7,
)
PHRASINGS = {"code": CODE, "ruler": RULER}
NamedPhrasing = Literal["code", "ruler"]


def phrasing(value: NamedPhrasing | Phrasing) -> Phrasing:
    return PHRASINGS[value] if isinstance(value, str) else value


def words_key(rng: random.Random, wording: Phrasing) -> str:
    return rng.choice(wording.adjectives) + wording.word_join + rng.choice(wording.nouns)


def digits_value(rng: random.Random, wording: Phrasing) -> str:
    return str(rng.randrange(1, 10)) + "".join(rng.choice("0123456789") for _ in range(wording.digits - 1))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
