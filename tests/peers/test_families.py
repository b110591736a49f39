"""Our attention inside the families that people load, and inside those that once went wrong without a word.

All families: `python -m tests.peers.sweep`, half a minute.
"""

from dataclasses import replace
from functools import partial

import pytest

transformers = pytest.importorskip(
    "transformers", reason="no transformers: our attention was not tried in its families"
)

from minillm.interfaces import transformers as interface  # noqa: E402
from tests.peers.families import families  # noqa: E402
from tests.peers.sweep import figures, sweep  # noqa: E402

RIGHT = {
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi3",
        "olmo3",
    ),
    *("cohere2", "granite", "smollm3", "gpt2", "gpt_neox", "opt", "deepseek_v3", "jamba", "lfm2", "bart"),
}
REFUSED = {  # and what the refusal names
    "llama4_text": "chunked_overlay",
    "bloom": "computes with its mask itself",
    "gpt_neox_japanese": "computes with its mask itself",
    "mpt": "computes with its mask itself",
    "doge": "computes with its mask itself",
    "gpt_oss": "s_aux",
    "inkling_text": "position_bias",
    "git": "computes with its mask itself",
}


def test_families_have_the_logits_of_their_own_attention_or_refuse_and_name_what_works(record_property):
    name = interface.register_with_transformers("swept", backend="tiled")
    outcomes = {outcome.family: outcome for outcome in sweep([*RIGHT, *REFUSED], name)}
    record_property("families", figures(list(outcomes.values())))
    print(figures(list(outcomes.values())))
    wrong = [str(outcome) for outcome in outcomes.values() if outcome.verdict in ("wrong", "not built")]
    assert not wrong, "\n".join(wrong)
    for family in RIGHT:
        assert outcomes[family].verdict == "right" and outcomes[family].calls, str(outcomes[family])
    for family, what in REFUSED.items():
        assert outcomes[family].verdict == "refused" and what in outcomes[family].why, str(outcomes[family])


def test_the_families_are_those_of_the_transformers_that_is_installed():
    assert RIGHT | REFUSED.keys() < {*families()}


def no_window(**kwargs):
    return replace(interface._describe_mask(**kwargs), window=None)


def no_padding(**kwargs):
    return replace(interface._describe_mask(**kwargs), real=None)


def always_causal(q_length, kv_length, **kwargs):
    return interface.Mask(q_length, kv_length)


def attend_to_all_keys(module, query, key, *args, sliding_window=None, **kwargs):
    return interface._attend(module, query, key, *args, backend="tiled", **kwargs)


def without_its_mask(module, query, key, value, attention_mask, *args, sliding_window=None, **kwargs):
    plain = interface.Mask(query.shape[2], key.shape[2])
    return interface._attend(module, query, key, value, plain, *args, backend="tiled", **kwargs)


@pytest.mark.parametrize(
    ("family", "mask", "attend"),
    [
        ("mistral", no_window, attend_to_all_keys),
        ("gemma2", no_window, attend_to_all_keys),
        ("llama", no_padding, partial(interface._attend, backend="tiled")),
        ("llama", interface._describe_mask, without_its_mask),
        ("llama4_text", always_causal, attend_to_all_keys),
        ("gpt_oss", interface._describe_mask, lambda *args, s_aux=None, **kwargs: attend_to_all_keys(*args, **kwargs)),
    ],
)
def test_the_sweep_sees_a_fault(family, mask, attend):
    transformers.AttentionInterface.register("faulty", attend)
    transformers.AttentionMaskInterface.register("faulty", mask)
    (outcome,) = sweep([family], "faulty")
    assert outcome.verdict == "wrong" and "error" in outcome.why, str(outcome)


def test_the_sweep_sees_a_refusal_that_names_what_the_model_has_not():
    def refuse(*args, **kwargs):
        raise ValueError("s_aux is not supported: take attn_implementation='sdpa'")  # gpt-oss has no SDPA

    transformers.AttentionInterface.register("faulty", refuse)
    transformers.AttentionMaskInterface.register("faulty", interface._describe_mask)
    (outcome,) = sweep(["gpt_oss"], "faulty")
    assert outcome.verdict == "wrong", str(outcome)
