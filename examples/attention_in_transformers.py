"""Our attention inside a model of Hugging Face's transformers: the same logits as with PyTorch's own."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.interfaces.transformers import register_with_transformers

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()  # random weights; a model from_pretrained works alike
ids = torch.randint(0, 97, (1, 20))

with torch.no_grad():
    model.set_attn_implementation("sdpa")
    theirs = model(ids).logits
    model.set_attn_implementation(register_with_transformers(backend="tiled"))  # registered as "minillm"
    ours = model(ids).logits

print("attention by", model.config._attn_implementation)
print(f"largest logit {theirs.abs().max():.2f}, largest difference {(ours - theirs).abs().max():.0e}")
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
