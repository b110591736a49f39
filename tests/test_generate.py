"""TextGenerator: what the model would say without a cache, in any batch, as a stream, and clear refusals."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from minillm.checkpoint import load_checkpoint
from minillm.corpus import BOT, CATEGORIES, POOLS, user_turn
from minillm.decode import Decoder
from minillm.generate import TextGenerator, main
from minillm.measure import profile
from minillm.tokenizer import END_ID
from tests.cache.models import random_ids, random_model

MODEL, TOKENIZER = load_checkpoint()
GENERATOR = TextGenerator(MODEL, TOKENIZER)
TALK = "I live in Lima. The train was late again. My cat is called Mira. It was a long day. "
QUESTIONS = {"Where do I live?": "You live in Lima.", "What is my cat called?": "Your cat is called Mira."}


def prompt(text):
    return TOKENIZER.encode(user_turn([text]) + BOT).ids


@torch.no_grad()
def greedy_without_a_cache(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_flash_attention=False)[0, -1].argmax()))
    return ids[-count:]


def test_the_call_of_the_seed_runs():
    generator = TextGenerator(use_flash_attention=True)
    prompt_ids = torch.tensor([prompt("I live in Oslo. Where do I live?")])
    generated_ids = generator.generate(prompt_ids=prompt_ids, max_new_tokens=50, temperature=0.8)
    assert len(generated_ids) == 1 and all(isinstance(token, int) for token in generated_ids[0])


@pytest.mark.parametrize("form", [list, torch.tensor, np.array, lambda ids: list(np.array(ids))])
def test_ids_come_as_a_list_a_tensor_or_an_array(form):
    ids = [[5, 6, 7], [8, 9, 10]]
    expected = GENERATOR.generate(ids, 3, temperature=0)
    assert GENERATOR.generate(form(ids), 3, temperature=0) == expected
    assert GENERATOR.generate(form(ids[0]), 3, temperature=0) == expected[0]


@pytest.mark.parametrize("question, answer", QUESTIONS.items())
def test_the_shipped_model_answers_from_what_was_said(question, answer):
    assert GENERATOR.answer(TALK + question, temperature=0) == answer
    assert TextGenerator(MODEL, TOKENIZER, weights="int8").answer(TALK + question, temperature=0) == answer


@pytest.mark.parametrize("use_flash_attention", [True, False])
def test_greedy_writes_what_the_model_without_a_cache_writes(use_flash_attention):
    model = random_model(torch.float64)
    generator = TextGenerator(model, use_flash_attention=use_flash_attention)
    for length in (1, 9, 40):
        ids = random_ids(length, seed=length).tolist()
        written = generator.generate(ids, 20, temperature=0, stop_tokens=())
        assert written == greedy_without_a_cache(model, ids, 20)


@pytest.mark.parametrize("batch", [2, 16])
def test_a_batch_writes_what_each_of_its_rows_writes_alone(batch):
    model = random_model(torch.float64)
    generator = TextGenerator(model)
    rows = [random_ids(1 + 2 * row, seed=row).tolist() for row in range(batch)]
    together = generator.generate(rows, 12, temperature=0, stop_tokens=(3,))
    assert together == [generator.generate(row, 12, temperature=0, stop_tokens=(3,)) for row in rows]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model = random_model(torch.float64)
    generator = TextGenerator(model)
    ids = random_ids(2, 7).tolist()
    free = generator.generate(ids, 12, temperature=0, stop_tokens=())
    stop = free[0][4]
    assert stop not in free[0][:4] and stop not in free[1]
    stopped = generator.generate(ids, 12, temperature=0, stop_tokens=(stop,))
    assert stopped == [free[0][:4], free[1]]
    steps = list(generator.stream(ids, 12, temperature=0, stop_tokens=(stop,)))
    assert [step[0] for step in steps] == free[0][:4] + [None] * 8


def test_the_same_seed_writes_the_same_and_another_one_something_else():
    model = random_model()
    for parameter in model.parameters():
        parameter.data *= 0.5  # so that more than one token has a chance
    generator = TextGenerator(model)
    ids = random_ids(3, 5)
    options = dict(max_new_tokens=20, temperature=1.0, top_p=0.95, stop_tokens=())
    first = generator.generate(ids, seed=7, **options)
    assert generator.generate(ids, seed=7, **options) == first != generator.generate(ids, seed=8, **options)


def test_a_stream_gives_each_token_before_the_next_is_computed(monkeypatch):
    calls = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: calls.append(1) or step(*args))
    stream = GENERATOR.stream(prompt(TALK + "Where do I live?"), temperature=0)
    for steps in range(3):
        assert len(next(stream)) == 1 and len(calls) == steps


def test_the_pieces_of_a_streamed_text_make_the_text_and_split_no_character():
    text = " \N{STEAMING BOWL} naïve 你好"
    ids = TOKENIZER.encode(text).ids
    pieces = list(GENERATOR._pieces(iter([[token] for token in ids])))
    assert "".join(pieces) == TOKENIZER.decode(ids) and len(pieces) < len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    half = list(GENERATOR._pieces(iter([[token] for token in TOKENIZER.encode("你").ids[:-1]])))
    assert half and "\N{REPLACEMENT CHARACTER}" in half[-1]  # what never became a character is not swallowed


def test_characters_that_the_tokenizer_has_never_seen_are_written_byte_by_byte():
    assert isinstance(GENERATOR.answer("我住在 Oslo \N{STEAMING BOWL}. Where do I live?", temperature=0), str)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: GENERATOR.generate([]), "prompt_ids is empty"),
        (lambda: GENERATOR.generate([[5], []]), r"prompt_ids\[1\] is empty"),
        (lambda: GENERATOR.generate([5] * 480), "480 tokens and max_new_tokens is 50, the model holds 512"),
        (lambda: GENERATOR.generate([5, 1536]), "holds the id 1536, the vocabulary goes from 0 to 1535"),
        (lambda: GENERATOR.generate([5, -1]), "holds the id -1"),
        (lambda: GENERATOR.generate([5], 0), "max_new_tokens is 0"),
        (lambda: GENERATOR.generate([5], temperature=-1), "temperature is -1"),
        (lambda: GENERATOR.generate([5], top_p=0), "top_p is 0"),
        (lambda: GENERATOR.generate([5], top_k=-2), "top_k is -2"),
        (lambda: GENERATOR.generate([5], min_p=2), "min_p is 2"),
        (lambda: GENERATOR.stream([5] * 480), "480 tokens"),  # at the call, not at the first token
        (lambda: GENERATOR.stream_text("  "), "text is blank"),
        (lambda: GENERATOR.stream_text("Hello <|bot|> I"), "text holds '<|bot|>'"),
        (lambda: GENERATOR.stream_text("word " * 600), "the model holds 512"),
        (lambda: TextGenerator(MODEL).stream_text("Hello"), "tokenizer is None"),
        (lambda: GENERATOR.stream_text("Hello \udcff"), "text is not Unicode"),
        (lambda: GENERATOR.stream([5], seed=2**64), "seed is 18446744073709551616"),
        (lambda: TextGenerator(MODEL, weights="int3"), "weights is 'int3'"),
        (lambda: TextGenerator(MODEL, weights="int3", use_flash_attention=False), "weights is 'int3'"),
        (lambda: TextGenerator(MODEL, weights="int8", use_flash_attention=False), "where use_flash_attention is False"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        call()


@pytest.mark.parametrize("ids", ["Hello", ["Hello"], 5, None, [1.0, 2.0], torch.ones(3), torch.ones(1, 1, 1).long()])
def test_what_are_no_ids_is_refused(ids):
    with pytest.raises(TypeError, match="prompt_ids is .* wants the integer ids of one prompt, or of several"):
        GENERATOR.generate(ids)


def test_a_prompt_that_just_fits_is_written_on_to_the_limit():
    model = random_model()
    assert len(TextGenerator(model).generate(random_ids(54), 10, stop_tokens=())) == 10


def test_prefill_and_decode_are_profiled_by_name():
    with profile(log_memory=True) as report:
        tokens = GENERATOR.generate(prompt(TALK + "Where do I live?"), temperature=0)
    assert report.phases["prefill"].tokens == len(prompt(TALK + "Where do I live?"))
    assert report.phases["decode"].tokens == len(report.phases["decode"].seconds) == len(tokens)  # the last is the stop
    assert END_ID not in tokens and report.phases["prefill"].peak_bytes > 0


def test_the_command_line_writes_the_answer_and_the_rate():
    command = [sys.executable, "-m", "minillm.generate", TALK + "Where do I live?"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "You live in Lima."
    assert "tokens/s" in done.stderr and "prefill" in done.stderr and "decode" in done.stderr


def test_the_command_line_s_help_says_what_one_can_say_and_ask(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().out
    for category in CATEGORIES:
        assert category.statement.partition("{")[0] in told and category.question in told
    for values in POOLS.values():
        assert all(value in " ".join(told.split()) for value in values)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "text is blank"),
        (["Hello", "--checkpoint", "nowhere"], "no checkpoint there"),
        (["Hello \udcff"], "text is not Unicode"),  # how Python hands on an argument that is not UTF-8
        (["Hello", "--seed", "99999999999999999999"], "wants a number of 64 bits"),
        (["Hello", "--temperature", "nan"], "temperature is nan"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_ends_in_peace_where_nobody_reads_on(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["generate", "Hello"])
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        main()
        closed.write("more")  # what is left over at the interpreter's exit
