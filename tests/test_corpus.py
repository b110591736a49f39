"""The corpus keeps its promises: held-out pairs stay out, answers repeat the wording, questions are fair."""

import random
import re

import pytest

from minillm.corpus import (
    ABSTENTION,
    BOT,
    CATEGORIES,
    END,
    POOLS,
    SMALL_TALK,
    USER,
    any_word,
    dialogue_with_changes,
    is_held_out,
    training_dialogue,
    values_of,
)
from minillm.evaluate import abstention_dialogue, recall_dialogue
from minillm.train import corpus_tokenizer

TOKENIZER = corpus_tokenizer(1536, seed=0)
CHANGES = [dialogue_with_changes(random.Random(seed), 5, 24, 6, hard=seed % 2 == 0) for seed in range(400)]
DIALOGUES = [training_dialogue(random.Random(seed), 8, 32, 6) for seed in range(400)]


def test_training_never_states_a_held_out_pair():
    for category in CATEGORIES:
        for value in values_of(category, held_out=True):
            sentences = (category.statement.format(value), category.answer.format(value))
            assert not any(sentence in dialogue for dialogue in DIALOGUES + CHANGES for sentence in sentences)


def test_every_value_is_stated_in_training_for_some_other_category():
    for category in CATEGORIES:
        siblings = [other for other in CATEGORIES if other.pool == category.pool and other is not category]
        for value in values_of(category, held_out=True):
            assert siblings and not any(is_held_out(other, value) for other in siblings)


def test_a_fifth_of_the_pairs_is_held_out():
    for category in CATEGORIES:
        assert len(values_of(category, held_out=True)) == len(POOLS[category.pool]) // 5


@pytest.mark.parametrize("dialogues", [DIALOGUES, CHANGES], ids=["each said once", "some said twice"])
def test_answers_follow_from_what_was_said_last(dialogues):
    changed = 0
    for dialogue in dialogues:
        said = ""
        for user, bot in re.findall(re.escape(USER) + r"(.*?)" + re.escape(BOT) + r" (.*?)" + re.escape(END), dialogue):
            said += user
            category = next(c for c in CATEGORIES if user.endswith(c.question))
            values = re.findall(re.escape(category.statement).replace(r"\{\}", r"([\w ]+)"), said)
            assert bot == (category.answer.format(values[-1]) if values else ABSTENTION)
            changed += len(set(values)) > 1
    assert (changed > 200) == (dialogues is CHANGES) and (changed == 0) == (dialogues is DIALOGUES)


def test_small_talk_says_nothing_that_a_question_asks_for():
    for category in CATEGORIES:
        key = category.statement.split("{}")[0]
        assert not any(key in sentence for sentence in SMALL_TALK)


def test_dialogues_are_the_same_for_the_same_seed():
    assert training_dialogue(random.Random(5), 8, 32, 6) == DIALOGUES[5]


def test_evaluation_asks_about_held_out_facts_at_the_distance_that_it_says():
    for seed in range(50):
        prompt, answer = recall_dialogue(random.Random(seed), 7, 200, TOKENIZER)
        category = next(c for c in CATEGORIES if prompt.endswith(c.question))
        statement = next(s for v in values_of(category, True) if (s := category.statement.format(v)) in prompt)
        between = prompt.split(statement)[1].removesuffix(category.question)
        assert 200 <= len(TOKENIZER.encode(between).ids) <= 220
        assert answer == f"{BOT} {category.answer.format(statement[len(category.statement.split('{}')[0]) : -1])}{END}"


def test_a_change_states_two_held_out_values_and_asks_for_the_last():
    for seed in range(50):
        prompt, answer = recall_dialogue(random.Random(seed), 7, 200, TOKENIZER, changed=True)
        category = next(c for c in CATEGORIES if prompt.endswith(c.question))
        stated = {prompt.find(category.statement.format(v)): v for v in values_of(category, True)}
        (_, old), (place, new) = sorted(item for item in stated.items() if item[0] >= 0)
        assert old != new and answer == f"{BOT} {category.answer.format(new)}{END}"
        between = prompt[place:].removeprefix(category.statement.format(new)).removesuffix(category.question)
        assert 200 <= len(TOKENIZER.encode(between).ids) <= 220


def test_any_word_is_one_word_or_two_of_letters():
    words = [any_word(random.Random(seed)) for seed in range(500)]
    assert all(re.fullmatch(r"[A-Za-z]{2,}( [A-Za-z]{2,})?", word) for word in words), words
    assert len(set(words)) > 450 and any(" " in word for word in words) and any(word.islower() for word in words)


def test_abstention_asks_about_what_was_not_said():
    for seed in range(50):
        prompt, answer = abstention_dialogue(random.Random(seed), 7, 120, TOKENIZER)
        category = next(c for c in CATEGORIES if prompt.endswith(c.question))
        assert category.statement.split("{}")[0] not in prompt
        assert answer == f"{BOT} {ABSTENTION}{END}"


def test_every_value_is_one_token_a_word_and_any_text_survives():
    for value in (value for pool in POOLS.values() for value in pool):
        assert len(TOKENIZER.encode(value).ids) == len(value.split())
    for text in ("My dish is ramen.", "naïve 注意力 🙂", "a  b\n\tc"):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == " " + text
