"""TextGenerator on a model that changes, from several threads, with other people's models and tokenizers."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune as prune_weights
from torch.nn.utils.parametrize import register_parametrization

from minillm import MiniLLM
from minillm.checkpoint import load_checkpoint, to_transformers
from minillm.decode import Decoder
from minillm.generate import TextGenerator
from minillm.tokenizer import END_ID
from tests.cache.models import random_ids, random_model

PROMPT = [5, 6, 7]


def write(generator, prompt=PROMPT, count=12):
    return generator.generate(prompt, count, temperature=0, stop_tokens=())


def own_forward(model, prompt=PROMPT, count=12):
    return write(TextGenerator(model, use_flash_attention=False), prompt, count)


class Adapter(nn.Module):
    """LoRA, as adapters are made: a module in the place of a Linear, with its weight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down = nn.Parameter(torch.randn(4, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 4))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def new_values(x, scale=0.3):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * scale


@torch.no_grad()
def train_a_step(model):
    for x in model.parameters():
        x.mul_(1.2).add_(new_values(x))


def train_through_data(model):
    for x in model.parameters():
        x.data += new_values(x)


def give_new_data(model):
    for x in model.parameters():
        x.data = new_values(x)


def give_a_new_parameter(model):
    down = model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(new_values(down.weight, 2))


def load_other_weights(model):
    model.load_state_dict({name: new_values(x) for name, x in model.state_dict().items()})


def change_the_dtype(model):
    train_a_step(model)
    model.double()


def give_a_new_config(model):
    model.config = replace(model.config, rope_theta=3.0)


def add_an_adapter(model):
    model.layers[0].self_attn.q_proj = Adapter(model.layers[0].self_attn.q_proj)


def add_a_hook(model):
    model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: out * 0)


def add_a_hook_before(model):
    model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def replace_a_forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


def replace_a_linear_by_one_with_bias(model):
    attention = model.layers[0].self_attn
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features)
    nn.init.normal_(attention.o_proj.bias, std=3)


def replace_a_norm(model):
    model.norm = nn.LayerNorm(model.config.hidden_size)


def parametrise(model):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    register_parametrization(model.layers[1].self_attn.v_proj, "weight", Doubled())


def prune(model):
    prune_weights.l1_unstructured(model.layers[0].mlp.gate_proj, "weight", 0.5)


PACKED_AGAIN = [
    train_a_step, train_through_data, give_new_data, give_a_new_parameter, load_other_weights, change_the_dtype,
    give_a_new_config,
]  # fmt: skip
OWN_FORWARD = [
    add_an_adapter, add_a_hook, add_a_hook_before, replace_a_forward, replace_a_linear_by_one_with_bias, replace_a_norm,
    parametrise, prune,
]  # fmt: skip


@pytest.mark.parametrize("change", [*PACKED_AGAIN, *OWN_FORWARD], ids=lambda change: change.__name__)
def test_what_is_written_is_what_the_model_writes_now(change, monkeypatch):
    model = random_model()
    generator, before = TextGenerator(model), own_forward(model)
    assert write(generator) == before
    change(model)
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: steps.append(1) or step(*args))
    now = own_forward(model)
    assert write(generator) == now != before
    assert write(TextGenerator(model)) == now  # and where it is changed already
    assert bool(steps) == (change in PACKED_AGAIN)


def test_weights_that_did_not_change_are_not_packed_again(monkeypatch):
    generator = TextGenerator(random_model())
    monkeypatch.setattr(Decoder, "_pack", None)
    write(generator)


def test_a_hook_that_is_taken_away_and_one_on_all_modules():
    model = random_model()
    generator, before = TextGenerator(model), own_forward(model)
    handle = model.layers[0].register_forward_hook(lambda module, args, out: -out)
    assert write(generator) == own_forward(model) != before
    handle.remove()
    assert write(generator) == before
    handle = register_module_forward_hook(lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else out)
    try:
        assert write(generator) == own_forward(model) != before
    finally:
        handle.remove()


def test_a_subclass_and_a_compiled_model_run_their_own_forward():
    class Louder(MiniLLM):
        def forward(self, *args, **options):
            return -super().forward(*args, **options)

    plain = random_model()
    louder = Louder(plain.config).eval()
    louder.load_state_dict(plain.state_dict())
    assert write(TextGenerator(louder)) == own_forward(louder) != own_forward(plain)
    torch._dynamo.reset()
    assert write(TextGenerator(torch.compile(plain, backend="eager")), count=3) == own_forward(plain, count=3)


def test_int8_weights_of_a_model_with_hooks_are_refused_at_the_call():
    model = random_model()
    generator = TextGenerator(model, weights="int8")
    train_a_step(model)
    fresh = TextGenerator(model, weights="int8")
    assert write(generator) == write(fresh)
    add_a_hook(model)
    with pytest.raises(ValueError, match=r"weights is 'int8', and layers.0.self_attn.o_proj has a hook.*: take 'same'"):
        generator.stream(PROMPT)
    with pytest.raises(ValueError, match="weights is 'int8'"):
        TextGenerator(model, weights="int8")
    TextGenerator(model, weights="same").generate(PROMPT, 3)


def test_layers_that_a_cache_could_not_follow_are_refused():
    model = random_model()
    generator = TextGenerator(model)
    del model.layers[1]
    with pytest.raises(
        ValueError, match=r"model.layers have the numbers \[0\], and its config has num_hidden_layers 2"
    ):
        generator.stream(PROMPT)


def test_several_threads_write_what_one_writes():
    model = random_model(torch.float64)
    generator = TextGenerator(model)
    prompts = [random_ids(1 + 3 * row, seed=row).tolist() for row in range(4)] + [random_ids(2, 5).tolist()]
    expected, wrong = [write(generator, prompt) for prompt in prompts], []

    def run(prompt, right):
        for _ in range(8):
            written = write(generator, prompt)
            if written != right:
                wrong.append(written)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_streams_that_take_turns_do_not_disturb_each_other():
    generator = TextGenerator(random_model(torch.float64))
    prompts = [random_ids(4).tolist(), random_ids(2, 6).tolist()]
    streams = [generator.stream(prompt, 8, temperature=0, stop_tokens=()) for prompt in prompts]
    alone = [list(generator.stream(prompt, 8, temperature=0, stop_tokens=())) for prompt in prompts]
    assert [list(pair) for pair in zip(*streams, strict=True)] == [list(pair) for pair in zip(*alone, strict=True)]


@pytest.mark.parametrize("change", [lambda model: None, add_a_hook])
def test_under_autocast_a_text_is_written_and_its_first_token_is_the_models(change):
    model = random_model()
    change(model)
    generator = TextGenerator(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        written = write(generator)
        assert len(written) == 12 and written[0] == int(model(torch.tensor([PROMPT]))[0, -1].argmax())


STOPS = {
    "an int": lambda stop: stop,
    "a list": lambda stop: [stop],
    "a set": lambda stop: {stop, 1},
    "a tensor of one": lambda stop: torch.tensor(stop),
    "a tensor": lambda stop: torch.tensor([stop, stop]),
    "tensors in a list": lambda stop: [torch.tensor(stop)],
    "an array": lambda stop: np.array([stop]),
    "a number of numpy": lambda stop: np.int64(stop),
}


@pytest.mark.parametrize("form", STOPS.values(), ids=list(STOPS))
def test_stop_tokens_come_in_any_form(form):
    generator = TextGenerator(random_model())
    free = write(generator)
    stop = free[5]
    assert generator.generate(PROMPT, 12, temperature=0, stop_tokens=form(stop)) == free[: free.index(stop)]


@pytest.mark.parametrize(
    "stop_tokens", ["</s>", ["</s>"], 3.0, [None], torch.tensor([1.0]), torch.ones(1, 1).long(), True]
)
def test_what_are_no_stop_tokens_is_refused(stop_tokens):
    with pytest.raises(TypeError, match="stop_tokens is .*, wants a token's id"):
        TextGenerator(random_model()).stream(PROMPT, stop_tokens=stop_tokens)


def test_a_stop_token_outside_of_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="stop_tokens holds the id -1, the vocabulary goes from 0 to 60"):
        TextGenerator(random_model()).stream(PROMPT, stop_tokens=[4, -1])


def test_a_text_ends_where_its_model_ends_texts():
    ours, tokenizer = load_checkpoint()
    foreign = random_model()
    assert TextGenerator(ours, tokenizer).stop_tokens == (END_ID,)
    assert TextGenerator(foreign).stop_tokens == tuple(getattr(foreign.config, "eos_token_ids", ())) == ()
    assert TextGenerator(foreign, Tokenizer(models.BPE())).stop_tokens == ()
    generator = TextGenerator(foreign)
    generator.model.config = SimpleNamespace(**vars(foreign.config) | {"eos_token_ids": (7, 9)})
    assert generator.stop_tokens == (7, 9)


def test_a_model_that_writes_id_3_goes_on_unless_it_is_its_end():
    model = random_model()
    nn.init.zeros_(model.embed_tokens.weight)
    model.embed_tokens.weight.data[:] = 1.0
    nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        hidden = model.norm(model._run(torch.tensor([PROMPT]), None, {"backend": "naive"}))[0, -1]
        model.lm_head.weight[3] = hidden  # id 3 has the largest logit, whatever was written
    assert TextGenerator(model).generate(PROMPT, 5, temperature=0) == [3] * 5
    assert TextGenerator(model, load_checkpoint()[1]).generate(PROMPT, 5, temperature=0) == []


def test_other_peoples_models_and_tokenizers_are_refused_in_words():
    transformers = pytest.importorskip("transformers")
    ours, tokenizer = load_checkpoint()
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM, wants a MiniLLM: .*from_transformers"):
        TextGenerator(to_transformers(ours), tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(TypeError, match="tokenizer is a .*, wants a tokenizers.Tokenizer: leave it"):
        TextGenerator(ours, theirs)
    ids = theirs("I live in Lima.")["input_ids"]  # the cure
    assert len(TextGenerator(ours).generate(ids, 4)) == 4
    with pytest.raises(ValueError, match="tokenizer comes without a model"):
        TextGenerator(tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer has no tokens <\|pad\|>, .*: encode the prompt yourself"):
        TextGenerator(ours, Tokenizer(models.BPE())).answer("Hello")
