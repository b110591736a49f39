"""The language that the shipped model speaks: dialogues in which a person states preferences.

A person says things about themselves (a dish, a city, a hobby …) among small talk, and later asks. The answer
repeats the statement's wording, or says that it was not told. Every sentence here is generated, so the repo
holds the whole training set, and a test can ask about pairs that training never showed.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

USER, BOT, END, PAD = "<|user|>", "<|bot|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, USER, BOT, END)
ABSTENTION = "I do not know yet."

_POOLS = {
    "city": "Lisbon Oslo Kyoto Lima Cairo Prague Dublin Havana Nairobi Quito Hanoi Vienna Boston Athens Seville "
    "Tallinn Manila Zagreb Porto Bergen",
    "language": "Danish Swahili Spanish Korean Polish Hindi Greek Turkish Finnish Arabic Dutch Czech Thai Italian "
    "Welsh Basque Urdu Latin Maori Tamil",
    "food": "ramen salad lentils cheese mushrooms peanuts noodles shrimp tomatoes almonds tofu strawberries eggs "
    "walnuts salmon pancakes onions mango celery honey",
    "drink": "tea coffee cocoa lemonade cider milk juice soda kefir espresso cola tonic water punch broth "
    "kombucha lassi matcha nectar buttermilk",
    "colour": "red blue green yellow purple orange black white pink brown grey turquoise violet silver golden "
    "crimson beige indigo olive scarlet",
    "activity": "chess painting rowing knitting fencing pottery climbing gardening sailing archery baking surfing "
    "juggling skating origami hiking cycling fishing yoga karate",
    "band": "Nightbus/Paper Moon/Lanterns/Velvet Otter/Monsoon/Low Tide/Acrobats/Glass Harbour/Sundial/"
    "Copper Fox/Postmen/Static Rain/Juniper/Wild Orchard/Tin Parade/Polaris/Sleepers/Mild Thunder/"
    "Ember/North Window",
    "name": "Ada Boris Chen Dora Emil Farah Goran Hana Igor Jonas Kira Leo Mira Nadia Omar Petra Rosa Sven Tara Yuki",
}
POOLS = {pool: names.split("/" if "/" in names else " ") for pool, names in _POOLS.items()}


# What words are made of, the frequent ones more often; "x" and "zz" are there too.
_VOWELS = ("a e i o u " * 6 + "ee oo ai ou ea ie y aa io").split()
_CONSONANTS = (
    "b c d f g h j k l m n p r s t v w z " * 3
    + "l m n r s t " * 3
    + "x q ch sh th ll nn tt ss rr st nd rt ng ck pp zz mb"
).split()


@dataclass(frozen=True)
class Category:
    """One thing that a person can say about themselves; `{}` stands for the value."""

    name: str
    pool: str
    statement: str
    question: str
    answer: str


CATEGORIES = tuple(
    Category(*row)
    for row in (
        ("home", "city", "I live in {}.", "Where do I live?", "You live in {}."),
        ("birthplace", "city", "I was born in {}.", "Where was I born?", "You were born in {}."),
        ("trip", "city", "I want to visit {}.", "What do I want to visit?", "You want to visit {}."),
        ("mother tongue", "language", "I speak {}.", "What do I speak?", "You speak {}."),
        ("course", "language", "I am learning {}.", "What am I learning?", "You are learning {}."),
        ("dish", "food", "My favourite dish is {}.", "What is my favourite dish?", "Your favourite dish is {}."),
        ("allergy", "food", "I am allergic to {}.", "What am I allergic to?", "You are allergic to {}."),
        ("drink", "drink", "My favourite drink is {}.", "What is my favourite drink?", "Your favourite drink is {}."),
        (
            "breakfast",
            "drink",
            "At breakfast I drink {}.",
            "What do I drink at breakfast?",
            "At breakfast you drink {}.",
        ),
        (
            "colour",
            "colour",
            "My favourite colour is {}.",
            "What is my favourite colour?",
            "Your favourite colour is {}.",
        ),
        ("bicycle", "colour", "My bicycle is {}.", "What colour is my bicycle?", "Your bicycle is {}."),
        ("hobby", "activity", "My hobby is {}.", "What is my hobby?", "Your hobby is {}."),
        ("Sunday", "activity", "On Sundays I enjoy {}.", "What do I enjoy on Sundays?", "On Sundays you enjoy {}."),
        ("band", "band", "My favourite band is {}.", "What is my favourite band?", "Your favourite band is {}."),
        ("tickets", "band", "I have tickets for {}.", "What do I have tickets for?", "You have tickets for {}."),
        ("name", "name", "My name is {}.", "What is my name?", "Your name is {}."),
        ("sister", "name", "My sister is called {}.", "What is my sister called?", "Your sister is called {}."),
        ("cat", "name", "My cat is called {}.", "What is my cat called?", "Your cat is called {}."),
    )
)

SMALL_TALK = (
    "The rain stopped at noon.",
    "It was a long day.",
    "The train was late again.",
    "A neighbour is fixing the roof.",
    "The window was open all night.",
    "Somebody left a bag at the station.",
    "The weather is warm today.",
    "The shop on the corner has closed.",
    "We walked along the river.",
    "The bus was full this morning.",
    "There is snow on the hills.",
    "A dog barked at the postman.",
    "The lights went out for an hour.",
    "Traffic was slow near the bridge.",
    "The garden needs some sun.",
    "They are building a new school.",
    "The film last night was too long.",
    "Everyone talked about the match.",
    "The lift is broken again.",
    "A friend sent a long letter.",
    "The market opens at eight.",
    "That was a quiet evening.",
    "The wind is strong by the sea.",
    "Our meeting was short.",
    "The library has new chairs.",
    "It is getting dark early now.",
    "A colleague told a good joke.",
    "The road is closed until Friday.",
    "There was a queue at the bank.",
    "The soup was too hot.",
    "Next week will be busy.",
    "The phone rang all afternoon.",
    "Thanks for listening.",
    "Let us talk about something else.",
    "The clouds look heavy.",
    "A child lost a red balloon.",
    "The museum is free on Mondays.",
    "The radio played old songs.",
    "Two birds sat on the fence.",
    "The coffee machine makes a strange noise.",
)
# Small talk with a value in it: a value alone is no answer, the user has to state it of themselves.
SMALL_TALK_WITH_VALUE = (
    ("city", "There was a report about {} on the news."),
    ("city", "A colleague just came back from {}."),
    ("language", "The sign on the door was in {}."),
    ("food", "The shop has sold out of {}."),
    ("food", "Somebody brought {} to the office."),
    ("drink", "They ran out of {} at the station."),
    ("colour", "The new fence next door is {}."),
    ("activity", "The neighbours talk about {} all day."),
    ("band", "A poster for {} hangs by the door."),
    ("name", "A person called {} rang this morning."),
)


def is_held_out(category: Category, value: str) -> bool:
    """Whether training never states this value for this category (it does for the pool's other categories)."""
    siblings = [other for other in CATEGORIES if other.pool == category.pool]
    return POOLS[category.pool].index(value) % 5 == siblings.index(category)


def values_of(category: Category, held_out: bool) -> list[str]:
    """The category's values that training shows, or the ones that it holds out for the test."""
    return [value for value in POOLS[category.pool] if is_held_out(category, value) == held_out]


@dataclass(frozen=True)
class Fact:
    """What a person states and later asks for: a category and a value, such as dish and ramen."""

    category: Category
    value: str

    @property
    def statement(self) -> str:
        """What the user says, such as "My favourite dish is ramen." """
        return self.category.statement.format(self.value)

    @property
    def answer(self) -> str:
        """What the model is to answer, such as "Your favourite dish is ramen." """
        return self.category.answer.format(self.value)


class OddWords(NamedTuple):
    """Words that are no values: how one is made, and their share among the values that do not belong."""

    make: Callable[[random.Random], str]
    share: float


def small_talk(rng: random.Random) -> str:
    """One sentence that says nothing about the person."""
    if rng.random() < 0.75:
        return rng.choice(SMALL_TALK)
    pool, sentence = rng.choice(SMALL_TALK_WITH_VALUE)
    return sentence.format(rng.choice(POOLS[pool]))


def random_facts(
    rng: random.Random,
    count: int,
    held_out: bool = False,
    odd: float = 0.0,
    odd_words: OddWords | None = None,
) -> list[Fact]:
    """Facts of `count` different categories.

    Args:
        held_out: take the pairs that training never shows.
        odd: share of facts with a value that does not belong to its category, or is no word at all. They keep the
            model from learning which values a category has, instead of looking up what was said.
        odd_words: those that are no values; `INVENTED` where left out.
    """
    categories = rng.sample(CATEGORIES, count)
    return [_fact(rng, category, held_out, odd, odd_words or INVENTED) for category in categories]


def _fact(rng: random.Random, category: Category, held_out: bool, odd: float, odd_words: OddWords) -> Fact:
    if rng.random() < odd:
        return Fact(category, odd_value(rng, category, odd_words))
    return Fact(category, rng.choice(values_of(category, held_out)))


def odd_value(rng: random.Random, category: Category, odd_words: OddWords) -> str:
    """A word that is no value at all, or a value of another category's pool."""
    if rng.random() < odd_words.share:
        return odd_words.make(rng)
    return rng.choice(POOLS[rng.choice([pool for pool in POOLS if pool != category.pool])])


def invented_word(rng: random.Random) -> str:
    """A word that means nothing, so that the model learns to copy what it has never seen."""
    word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return word.capitalize() if rng.random() < 0.5 else word


def any_word(rng: random.Random) -> str:
    """A word or two of any letters, such as "Anna", "Felix" and "New York" are made of."""
    if rng.random() < 0.2:
        return invented_word(rng)
    words = []
    for _ in range(2 if rng.random() < 0.1 else 1):
        starts_open = rng.random() < 0.3
        parts = [
            rng.choice(_VOWELS if bool(index % 2) != starts_open else _CONSONANTS) for index in range(rng.randint(2, 6))
        ]
        words.append("".join(parts))
    text = " ".join(words)
    return text.title() if rng.random() < 0.7 else text


INVENTED, ANY = OddWords(invented_word, 0.25), OddWords(any_word, 0.6)


def user_turn(sentences: list[str], rng: random.Random | None = None) -> str:
    """What the person says, as one turn; with `rng`, now and then in several turns in a row."""
    starts = [index == 0 or (rng is not None and rng.random() < 0.1) for index in range(len(sentences))]
    return "".join((USER if start else "") + " " + text for start, text in zip(starts, sentences, strict=True))


def bot_turn(answer: str) -> str:
    """An answer as one turn of the model."""
    return BOT + " " + answer + END


def training_dialogue(
    rng: random.Random, max_facts: int, num_sentences: int, num_questions: int, hard: bool = False
) -> str:
    """A dialogue with facts strewn among small talk, and questions about said and unsaid things.

    Half of the dialogues keep all their questions for the end, so that answers lie far from facts;
    in the others the questions come in between. In a hard one, more is asked that was not said, and in words that
    are close to what was ("my favourite band", when the favourite dish is known).
    """
    facts = random_facts(rng, rng.randint(1, max_facts), odd=0.4)
    return _dialogue(rng, facts, num_sentences, num_questions, hard)


def dialogue_with_changes(
    rng: random.Random, max_facts: int, num_sentences: int, num_questions: int, hard: bool = False
) -> str:
    """The same, and one fact or two are stated again with another value: what was said last holds."""
    facts = random_facts(rng, rng.randint(1, max(1, max_facts - 1)), odd=0.4, odd_words=ANY)
    changed = rng.sample(facts, rng.randint(1, min(2, len(facts))))
    facts += [_fact(rng, fact.category, False, 0.4, ANY) for fact in changed]
    rng.shuffle(facts)
    return _dialogue(rng, facts, max(num_sentences, len(facts)), num_questions, hard)


def _dialogue(rng: random.Random, facts: list[Fact], num_sentences: int, num_questions: int, hard: bool) -> str:
    stated = [fact.statement for fact in facts]
    sentences = stated + [small_talk(rng) for _ in range(num_sentences - len(facts))]
    rng.shuffle(sentences)
    late = rng.random() < 0.5
    stops = sorted(len(sentences) if late else rng.randint(1, len(sentences)) for _ in range(num_questions))
    asked: set[Category] = set()
    turns, start = [], 0
    for stop in stops:
        category, answer = _question(rng, what_holds(facts, sentences[:stop]), asked, hard)
        asked.add(category)
        turns += [user_turn(sentences[start:stop] + [category.question], rng), bot_turn(answer)]
        start = stop
    return "".join(turns)


def what_holds(facts: list[Fact], sentences: list[str]) -> list[Fact]:
    """Of each category the fact that was stated last, in the order of `facts`."""
    last = {sentence: index for index, sentence in enumerate(sentences)}
    said = [fact for fact in dict.fromkeys(facts) if fact.statement in last]
    newest = {fact.category: fact for fact in sorted(said, key=lambda fact: last[fact.statement])}
    return [fact for fact in said if newest[fact.category] is fact]


def _question(rng: random.Random, said: list[Fact], asked: set[Category], hard: bool) -> tuple[Category, str]:
    known = [fact for fact in said if fact.category not in asked]
    if known and rng.random() < (0.7 if hard else 0.75):
        fact = rng.choice(known)
        return fact.category, fact.answer
    unsaid = [c for c in CATEGORIES if c not in asked and c not in {fact.category for fact in said}]
    if hard and said:
        near = rng.choice(said).category
        return max(unsaid, key=lambda category: (_shared_words(category, near), rng.random())), ABSTENTION
    return rng.choice(unsaid), ABSTENTION


def _shared_words(a: Category, b: Category) -> int:
    return len(set(a.question.split()) & set(b.question.split()))


def what_can_be_said() -> str:
    """What a person can say to a model of this language and ask it, to be read: a line for each category and pool."""
    lines = ["Say something of yourself, in these words, and ask for it later:"]
    lines += [f"  {c.statement.format(f'<{c.pool}>'):36} {c.question}" for c in CATEGORIES]
    lines.append("Training had these words, and some that mean nothing:")
    for pool, values in POOLS.items():
        lines += textwrap.wrap(f"<{pool}>: {', '.join(values)}", 92, initial_indent="  ", subsequent_indent="    ")
    lines.append(f'Between them comes small talk, such as "{SMALL_TALK[1]}"; to what was not said, the answer is')
    return "\n".join(
        [*lines, f'"{ABSTENTION}" The model knows nothing else: no other sentences, nothing of the world.']
    )
