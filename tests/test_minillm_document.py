"""The calls that the MiniLLM document shows (核心功能使用) run as they stand there, with our package's name."""

import torch


def test_the_snippets_of_the_minillm_document_run():
    from minillm import Configs, KVCache, MiniLLM, TextGenerator

    input_ids = torch.randint(1536, (2, 12))
    config = Configs.small()
    model = MiniLLM(config)
    kv_cache = KVCache(config, batch_size=2)
    output = model(input_ids, kv_cache=kv_cache, use_flash_attention=True, flash_block_size=128)
    assert output.shape == (2, 12, config.vocab_size) and kv_cache.lengths == [12, 12]

    prompt_ids = input_ids[0].tolist()
    generator = TextGenerator(use_flash_attention=True)
    generated_ids = generator.generate(prompt_ids=prompt_ids, max_new_tokens=50, temperature=0.8)
    assert len(generated_ids) <= 50 and all(isinstance(token, int) for token in generated_ids)
