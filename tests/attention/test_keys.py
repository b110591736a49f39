"""Keys in every layout, through every back end: each sequence as if it had been computed alone."""

from dataclasses import replace

import pytest
import torch

from kernels.runtime import prepare
from minillm.attention import Keys, attend, attention, backends, choose_backend, naive_attention
from minillm.attention.keys import Options, cu_seqlens_of
from minillm.measure import assert_within_budget

BACKENDS = ["auto", "naive", "tiled", "sdpa", *(["triton"] if prepare().name == "interpreter" else [])]
LENGTHS_K = [5, 0, 130, 16]
PAGE = 16
SHAPES = {"gqa": (4, 2), "mha": (2, 2)}


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def sequences(lengths, seed=0):
    """(k, v) for each length, (seqlen, 2, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 2, 8, generator=generator).unbind() for length in lengths]


def ragged(rows):
    k, v = (torch.cat([row[i] for row in rows]) for i in range(2))
    return Keys(k, v, cu_seqlens_of([len(k) for k, _ in rows]))


def cached(rows):
    """Room for 140 keys a sequence, NaN where there is none."""
    k, v = torch.full((2, len(rows), 140, 2, 8), torch.nan)
    for i, (key, value) in enumerate(rows):
        k[i, : len(key)], v[i, : len(key)] = key, value
    return Keys(k, v, cache_seqlens=int32([len(k) for k, _ in rows]))


def paged(rows):
    """Pages in a shuffled pool, NaN in all that is not used, block ids that do not exist behind the last page."""
    pool_k, pool_v = torch.full((2, 40, PAGE, 2, 8), torch.nan)
    free = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(rows), 9), -7, dtype=torch.int32)
    for i, (key, value) in enumerate(rows):
        for j in range(-(-len(key) // PAGE)):
            table[i, j] = page = free.pop()
            part = slice(j * PAGE, (j + 1) * PAGE)
            pool_k[page, : len(key[part])], pool_v[page, : len(key[part])] = key[part], value[part]
    return Keys(pool_k, pool_v, cache_seqlens=int32([len(k) for k, _ in rows]), block_table=table)


LAYOUTS = {"ragged": ragged, "cached": cached, "paged": paged}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("lengths_q", [[1, 1, 1, 1], [3, 3, 3, 3], [4, 0, 1, 20]], ids=str)
def test_each_sequence_is_as_if_computed_alone(lengths_q, layout, backend):
    rows = sequences(LENGTHS_K)
    queries = [torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(9 + n)) for n in lengths_q]
    options = dict(causal=True, window_size=(100, -1), backend=backend)
    return_lse = backend != "sdpa"
    if len(set(lengths_q)) == 1:
        result = attend(torch.stack(queries), layout(rows), return_lse=return_lse, **options)
        outs, lses = result if return_lse else (result, [None] * 4)
    else:
        bounds = cu_seqlens_of(lengths_q)
        result = attend(torch.cat(queries), layout(rows), cu_seqlens_q=bounds, return_lse=return_lse, **options)
        out, lse = result if return_lse else (result, None)
        assert out.shape == (25, 4, 8) and (lse is None or lse.shape == (4, 25))
        outs, lses = out.split(lengths_q), [None] * 4 if lse is None else lse.split(lengths_q, dim=1)
    for q, (k, v), out, lse in zip(queries, rows, outs, lses, strict=True):
        options = dict(causal=True, window_size=(100, -1), return_lse=True)
        naive = naive_attention(q[None], k[None], v[None], **options)
        reference = naive_attention(*(x[None].double() for x in (q, k, v)), **options)
        assert_within_budget(out[None], naive[0], reference[0])
        if lse is not None:
            assert_within_budget(lse[None], naive[1], reference[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_sequence_gives_an_empty_result(layout, backend):
    if layout is ragged:
        keys = Keys(torch.empty(0, 2, 8), torch.empty(0, 2, 8), int32([0]))
    else:
        keys = layout(sequences([3]))
        pool = keys.k[:0] if layout is cached else keys.k
        table = None if keys.block_table is None else keys.block_table[:0]
        keys = Keys(pool, pool, cache_seqlens=int32([]), block_table=table)
    assert attend(torch.empty(0, 3, 4, 8), keys, backend=backend).shape == (0, 3, 4, 8)
    assert attend(torch.empty(0, 4, 8), keys, cu_seqlens_q=int32([0]), backend=backend).shape == (0, 4, 8)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_gradient_reaches_keys_wherever_they_lie(layout):
    keys = layout(sequences(LENGTHS_K))
    leaves = [x.nan_to_num(0).requires_grad_() for x in (keys.k, keys.v)]
    q = torch.randn(4, 2, 4, 8)
    attend(q, replace(keys, k=leaves[0], v=leaves[1]), backend="tiled").sum().backward()
    for x, lain in zip(leaves, (keys.k, keys.v), strict=True):
        assert x.grad.isfinite().all() and not x.grad[lain.isnan()].any()
    assert leaves[1].grad[~keys.v.isnan()].all()


def test_upper_bounds_of_the_lengths_change_nothing():
    rows = sequences([5, 9])
    q, bounds = torch.randn(6, 4, 8), int32([0, 2, 6])
    tight = attend(q, ragged(rows), cu_seqlens_q=bounds, causal=True)
    loose = replace(ragged(rows), max_seqlen=30)
    for backend in BACKENDS:
        out = attend(q, loose, cu_seqlens_q=bounds, max_seqlen_q=11, causal=True, backend=backend)
        torch.testing.assert_close(out, tight)


K = torch.zeros(3, 4, 2, 8)


@pytest.mark.parametrize(
    "keys, message",
    [
        (Keys(K[0], K[0], int32([0, 4]), cache_seqlens=int32([4])), "cu_seqlens, and cache_seqlens or block_table"),
        (Keys(K, K, block_table=int32([[0], [1], [2]])), "a block_table and no cache_seqlens"),
        (Keys(K, K, cache_seqlens=int32([1, 2])), "the keys have 2 sequences, the queries 3"),
        (Keys(K, K, cache_seqlens=torch.tensor([1, 2, 3])), r"cache_seqlens is torch.int64 \(3,\), wants int32"),
        (Keys(K, K, cache_seqlens=int32([1, 2, 5])), r"cache_seqlens is \[1, 2, 5\], wants 0 to 4"),
        (Keys(K, K, cache_seqlens=int32([1, -1, 2])), r"cache_seqlens is \[1, -1, 2\]"),
        (Keys(K, K, cache_seqlens=int32([1, 2, 3]), block_table=int32([[0], [1]])), r"wants int32 \(3, max_blocks\)"),
        (Keys(K, K, cache_seqlens=int32([1, 2, 9]), block_table=int32([[0, 1]] * 3)), "wants 0 to 8"),
        (Keys(K, K, cache_seqlens=int32([1, 0, 5]), block_table=int32([[0, 9], [9, 9], [1, 3]])), r"blocks \[1, 3\]"),
        (Keys(K[0], K[0]), r"k has shape \(4, 2, 8\), wants \(batch"),
        (Keys(K, K, int32([0, 4])), r"k has shape \(3, 4, 2, 8\), wants \(total"),
        (Keys(K[..., :4], K[..., :4], cache_seqlens=int32([1, 2, 3])), "k has headdim 4, q has 8"),
        (Keys(K, K, cache_seqlens=int32([1, 2, 3]), max_seqlen=2), "max_seqlen is 2, and the keys are not ragged"),
        (Keys(K, K, max_seqlen=2), "max_seqlen is 2, and the keys are not ragged"),
        (Keys(K[:, :0], K[:, :0], cache_seqlens=int32([0, 0, 0]), block_table=int32([[0]] * 3)), "page_size 0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(3, 1, 4, 8), keys)


def test_a_cache_with_more_rows_than_lengths_is_refused_for_ragged_queries_too():
    with pytest.raises(ValueError, match="cache_seqlens has 2 lengths, k has 3 rows"):
        attend(torch.zeros(5, 4, 8), Keys(K, K, cache_seqlens=int32([1, 2])), cu_seqlens_q=int32([0, 2, 5]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_seqlen_q=4), "max_seqlen_q is 4, and q is not ragged"),
        (dict(window_size=(3.7, -1)), "window_size is .3.7, -1., wants"),
        (dict(window_size=None), "window_size is None, wants"),
        (dict(softcap=float("nan")), "softcap is nan"),
    ],
)
def test_options_that_would_be_ignored_or_misread_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(3, 1, 4, 8), Keys(K, K), **options)


def test_a_list_in_place_of_lengths_is_named():
    with pytest.raises(TypeError, match=r"cache_seqlens is \[1, 2, 3\], wants an int32 tensor"):
        attend(torch.zeros(3, 1, 4, 8), Keys(K, K, cache_seqlens=[1, 2, 3]))


def test_choose_backend_answers_for_keys_too_and_refuses_what_the_call_refuses():
    q = torch.zeros(3, 1, 4, 8)
    assert choose_backend(q, Keys(K, K, cache_seqlens=int32([1, 2, 3])), return_lse=True).name == "tiled"
    for call in (choose_backend, attention):
        with pytest.raises(ValueError, match="k has headdim 3, q has 8"):
            call(q, K[..., :3], K)
    with pytest.raises(TypeError, match="v is missing"):
        choose_backend(q, K)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="dropout_p"):
        attend(torch.zeros(3, 1, 4, 8), Keys(K, K), dropout_p=0.1)


def test_auto_never_takes_the_interpreter_and_on_a_cpu_the_fastest_that_can():
    q, keys, bounds = torch.zeros(3, 4, 8), ragged(sequences([5, 9])), int32([0, 1, 3])
    for return_lse, expected in ((False, "sdpa"), (True, "tiled")):
        options = Options(return_lse=return_lse, cu_seqlens_q=bounds)
        assert backends._choose(q, keys, options, "auto").name == expected
