"""Our attention inside Hugging Face models: the same logits and tokens as with their own attention, or a refusal."""

import copy

import pytest
import torch

from kernels.runtime import prepare
from minillm.attention import naive_attention
from minillm.interfaces.transformers import Mask, register_with_transformers
from minillm.measure import assert_within_budget

transformers = pytest.importorskip("transformers", reason="no transformers: our attention was not tried inside a model")
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

from tests.peers.sweep import budget_of  # noqa: E402

DTYPES = torch.float32, torch.float64

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # so that attention matters to the logits
)
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 97, (3, 20), generator=GENERATOR)
PADDED_LEFT = torch.ones_like(IDS)
PADDED_LEFT[0, :7] = PADDED_LEFT[2, :13] = 0


def model_of(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def llama():
    return model_of(transformers.LlamaConfig(**SIZES))


def three(model, run, backend="tiled"):
    """What `run` gives with eager attention, with SDPA, and with ours."""
    results = []
    with torch.no_grad():
        for implementation in ("eager", "sdpa", register_with_transformers(backend=backend)):
            model.set_attn_implementation(implementation)
            results.append(run(model))
    return results


def assert_same_logits(results, mask):
    eager, sdpa, ours = (logits[mask.bool()].cpu() for logits in results)
    budget = budget_of(ours, eager, sdpa)
    assert budget, str(budget)


@pytest.mark.parametrize("backend", ["auto", "naive", "triton"])
def test_a_llama_with_left_padding_gives_the_logits_of_its_own_sdpa(llama, backend):
    device = "cuda" if backend == "triton" and prepare().name == "gpu" else "cpu"
    ids, mask = IDS.to(device), PADDED_LEFT.to(device)
    assert_same_logits(three(llama.to(device), lambda model: model(ids, attention_mask=mask).logits, backend), mask)


def test_padding_on_the_right_and_none_at_all(llama):
    mask = PADDED_LEFT.flip(1)
    assert_same_logits(three(llama, lambda model: model(IDS, attention_mask=mask).logits), mask)
    assert_same_logits(three(llama, lambda model: model(IDS).logits), torch.ones_like(IDS))


def test_the_registered_mask_is_what_makes_padding_right(llama):
    """Without one, transformers hands our attention no mask, and padding would be attended to."""
    with torch.no_grad():
        llama.set_attn_implementation(register_with_transformers(backend="tiled"))
        padded, whole = (llama(IDS, attention_mask=mask).logits[0, -1] for mask in (PADDED_LEFT, None))
    assert (padded - whole).abs().max() > 1e-3


def test_generation_with_a_cache_writes_the_same_tokens(llama):
    options = dict(attention_mask=PADDED_LEFT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    eager, sdpa, ours = three(llama, lambda model: model.generate(IDS, **options))
    assert torch.equal(eager, ours) and torch.equal(sdpa, ours)


def test_a_sliding_window_counts_as_transformers_counts():
    model = model_of(transformers.MistralConfig(**SIZES, sliding_window=5))
    assert_same_logits(three(model, lambda m: m(IDS, attention_mask=PADDED_LEFT).logits), PADDED_LEFT)


def test_gradients_reach_the_weights(llama):
    def gradient(model):
        with torch.enable_grad():
            loss = model(IDS, attention_mask=PADDED_LEFT).logits[PADDED_LEFT.bool()].square().mean()
            return torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0]

    eager, sdpa, ours = three(llama, gradient)
    assert (budget := budget_of(ours, eager, sdpa)), str(budget)


def test_packed_sequences_and_static_caches_are_refused_and_not_computed_wrongly(llama):
    llama.set_attn_implementation(register_with_transformers(backend="tiled"))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed_sequence_mask_function.*packed sequences .position_ids"):
        llama(IDS[:1, :8], position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="past_key_values.*static cache.*sdpa"):
        llama.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")


def test_dropout_is_refused():
    model = model_of(transformers.LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    model.set_attn_implementation(register_with_transformers(backend="tiled"))
    with pytest.raises(ValueError, match="dropout is not supported by this attention"):
        model(IDS)


OURS = AttentionInterface()[register_with_transformers("ours", backend="tiled")]
Q, K, V = torch.randn(3, 2, 4, 9, 16, generator=GENERATOR)


class Layer(torch.nn.Module):
    """As much of a layer as an attention looks at."""

    def __init__(self, is_causal=True, config=None):
        super().__init__()
        self.is_causal, self.config = is_causal, config


@pytest.mark.parametrize(
    "argument", ["position_bias", "sinks", "s_aux", "alibi", "head_mask", "cu_seq_lens_q", "cache"]
)
def test_an_argument_that_changes_the_result_is_refused_by_its_name(argument):
    with pytest.raises(ValueError, match=f"{argument} is not supported .*attn_implementation='eager'"):
        OURS(Layer(), Q, K, V, Mask(9, 9), **{argument: torch.zeros(4)})
    OURS(Layer(), Q, K, V, Mask(9, 9), **{argument: None})


def test_an_argument_that_changes_nothing_is_taken():
    plain = OURS(Layer(), Q, K, V, Mask(9, 9))[0]
    given = OURS(Layer(), Q, K, V, Mask(9, 9), position_ids=torch.arange(9)[None], use_cache=True)[0]
    assert torch.equal(plain, given)


def test_probabilities_are_refused(llama):
    llama.set_attn_implementation(register_with_transformers(backend="tiled"))
    with pytest.raises(ValueError, match="output_attentions"):
        llama(IDS, output_attentions=True)


def test_a_causal_layer_that_never_asked_for_its_mask_is_refused_and_one_that_sees_all_is_not():
    with pytest.raises(ValueError, match="attention_mask is None: this model does not ask for its mask"):
        OURS(Layer(), Q, K, V, None)
    out = OURS(Layer(is_causal=False), Q, K, V, None)[0]
    eager, exact = (naive_attention(*(x.transpose(1, 2).to(dtype) for x in (Q, K, V))) for dtype in DTYPES)
    assert_within_budget(out, eager, exact)


def test_a_mask_of_other_queries_keys_or_window_is_refused():
    for mask, options, what in (
        (Mask(8, 9), {}, "is for 8 queries and 9 keys, and this layer has 9 and 9"),
        (Mask(9, 9), dict(sliding_window=4), "sliding_window is 4, and the mask of this layer has None"),
        (Mask(9, 9, window=3), dict(sliding_window=4), "sliding_window is 4, and the mask of this layer has 3"),
        (Mask(9, 9, real=torch.ones(3, 9).bool()), {}, "batch 3, and this layer has 2"),
    ):
        with pytest.raises(ValueError, match=what):
            OURS(Layer(), Q, K, V, mask, **options)


def test_a_window_in_the_mask_alone_is_kept():
    windowed, given = (OURS(Layer(), Q, K, V, Mask(9, 9, window=3), **o)[0] for o in ({}, {"sliding_window": 3}))
    assert torch.equal(windowed, given) and not torch.equal(windowed, OURS(Layer(), Q, K, V, Mask(9, 9))[0])


@pytest.mark.parametrize(
    "use", [lambda m: Q + m, lambda m: m[:, :4], lambda m: ~m, lambda m: 1.0 - m, lambda m: m.shape]
)
def test_a_model_that_computes_with_the_mask_is_refused(use):
    with pytest.raises(ValueError, match="computes with its mask itself.*attn_implementation='eager'"):
        use(Mask(9, 9))


def test_a_mask_of_ones_own_is_refused(llama):
    llama.set_attn_implementation(register_with_transformers(backend="tiled"))
    seen = torch.ones(20, 20).tril().bool()[None, None].expand(3, 1, 20, 20)
    for mask in (seen, torch.zeros(3, 1, 20, 20).masked_fill(~seen, torch.finfo(torch.float32).min)):
        with pytest.raises(ValueError, match=r"attention_mask is a torch.\w+ tensor of shape \(3, 1, 20, 20\).*'sdpa'"):
            llama(IDS, attention_mask=mask)


def test_padding_between_tokens_is_right_without_a_window_and_refused_with_one(llama):
    mask = torch.ones_like(IDS)
    mask[1, 8:12] = 0
    assert_same_logits(three(llama, lambda model: model(IDS, attention_mask=mask).logits), mask)
    model = model_of(transformers.MistralConfig(**SIZES, sliding_window=5))
    model.set_attn_implementation(register_with_transformers(backend="tiled"))
    with pytest.raises(ValueError, match="padding between tokens of a row.*'sdpa'"):
        model(IDS, attention_mask=mask)


@pytest.mark.parametrize(
    "mask", [torch.ones_like(IDS), PADDED_LEFT, PADDED_LEFT.flip(1)], ids=["whole", "left", "right"]
)
def test_a_model_that_sees_both_ways_keeps_its_mask(mask):
    config = transformers.LlamaConfig(**SIZES)
    config.is_causal = False
    assert_same_logits(three(model_of(config), lambda model: model(IDS, attention_mask=mask).logits), mask)


def test_chunks_that_are_longer_than_the_text_are_a_plain_causal_mask():
    sizes = SIZES | dict(head_dim=16, num_local_experts=1, intermediate_size_mlp=96, attention_chunk_size=20)
    config = transformers.Llama4TextConfig(**sizes, layer_types=["chunked_attention", "full_attention"])
    model = model_of(copy.deepcopy(config))
    assert_same_logits(three(model, lambda model: model(IDS).logits), torch.ones_like(IDS))


@pytest.mark.parametrize("how", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_blocks_that_see_each_other_and_masks_of_ones_own_are_refused(how):
    config = transformers.LlamaConfig(**SIZES, attn_implementation=register_with_transformers())
    embeddings = torch.zeros(3, 20, 64)
    prefix = {
        "or_mask_function": lambda batch, head, q, kv: kv < 6,
        "and_mask_function": lambda batch, head, q, kv: kv != 3,
        "block_sequence_ids": torch.zeros(3, 20, dtype=torch.long),
    }[how]
    with pytest.raises(ValueError, match=r"mask_function \(.*chunks.*'sdpa'"):
        create_causal_mask(config, embeddings, None, None, **{how: prefix})


def test_a_cure_that_a_refusal_names_is_one_that_the_model_has():
    for config, instead in (
        (transformers.LlamaConfig(**SIZES), "sdpa"),
        (transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1), "eager"),
    ):
        model = model_of(config)
        model.set_attn_implementation(register_with_transformers())
        with pytest.raises(ValueError, match=f"static cache.*attn_implementation='{instead}'"):
            model.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")
        model.set_attn_implementation(instead)
        assert model.generate(IDS, max_new_tokens=2, min_new_tokens=2, cache_implementation="static").shape == (3, 22)
