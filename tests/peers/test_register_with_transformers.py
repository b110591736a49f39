"""Our attention inside Hugging Face models: the same logits and the same tokens as with PyTorch's SDPA."""

import pytest
import torch

from kernels.runtime import prepare
from minillm.interfaces.transformers import register_with_transformers

transformers = pytest.importorskip("transformers", reason="no transformers: our attention was not tried inside a model")

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
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


def both(model, run, backend="tiled"):
    """What `run` gives with SDPA, and with ours."""
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        theirs = run(model)
        model.set_attn_implementation(register_with_transformers(backend=backend))
        return theirs, run(model)


def assert_same_logits(theirs, ours, mask):
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "naive", "triton"])
def test_a_llama_with_left_padding_gives_the_logits_of_its_own_sdpa(llama, backend):
    device = "cuda" if backend == "triton" and prepare().name == "gpu" else "cpu"
    ids, mask = IDS.to(device), PADDED_LEFT.to(device)
    results = both(llama.to(device), lambda model: model(ids, attention_mask=mask).logits, backend)
    theirs, ours = (logits.cpu() for logits in results)
    assert_same_logits(theirs, ours, PADDED_LEFT)


def test_padding_on_the_right_and_none_at_all(llama):
    mask = PADDED_LEFT.flip(1)
    assert_same_logits(*both(llama, lambda model: model(IDS, attention_mask=mask).logits), mask)
    assert_same_logits(*both(llama, lambda model: model(IDS).logits), torch.ones_like(IDS))


def test_the_registered_mask_is_what_makes_padding_right(llama):
    """Without one, transformers hands our attention no mask, and padding would be attended to."""
    with torch.no_grad():
        llama.set_attn_implementation(register_with_transformers(backend="tiled"))
        padded, whole = (llama(IDS, attention_mask=mask).logits[0, -1] for mask in (PADDED_LEFT, None))
    assert (padded - whole).abs().max() > 1e-3


def test_generation_with_a_cache_writes_the_same_tokens(llama):
    options = dict(attention_mask=PADDED_LEFT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    theirs, ours = both(llama, lambda model: model.generate(IDS, **options))
    assert torch.equal(theirs, ours)


def test_a_sliding_window_counts_as_transformers_counts():
    model = model_of(transformers.MistralConfig(**SIZES, sliding_window=5))
    assert_same_logits(*both(model, lambda m: m(IDS, attention_mask=PADDED_LEFT).logits), PADDED_LEFT)


def test_gradients_reach_the_weights(llama):
    def gradient(model):
        with torch.enable_grad():
            loss = model(IDS, attention_mask=PADDED_LEFT).logits[PADDED_LEFT.bool()].square().mean()
            return torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0]

    theirs, ours = both(llama, gradient)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_packed_sequences_and_static_caches_are_refused_and_not_computed_wrongly(llama):
    llama.set_attn_implementation(register_with_transformers(backend="tiled"))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="not packed sequences"):
        llama(IDS[:1, :8], position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="or a static cache"):
        llama.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")


def test_dropout_is_refused():
    model = model_of(transformers.LlamaConfig(**SIZES, attention_dropout=0.1)).train()
    model.set_attn_implementation(register_with_transformers(backend="tiled"))
    with pytest.raises(ValueError, match="dropout is not supported by this attention"):
        model(IDS)
