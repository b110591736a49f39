"""HBM traffic is counted from the code as it runs, and equals the sum over its tiles exactly."""

import random

import pytest
import torch

from minillm.attention import flash_attention, naive_attention
from minillm.attention.masks import Visibility, tiles
from minillm.attention.tiled import Tiling, tiled_forward, tiled_forward_keys_first
from minillm.measure import Counted, assert_within_budget, count_operators, count_traffic
from tests.attention.grid import random_qkv


def random_call(seed):
    """q, k, v and a tiling, with odd lengths, tails, groups and masks."""
    rng = random.Random(seed)
    nheads_k = rng.choice((1, 2, 3))
    heads = (nheads_k * rng.choice((1, 2, 4)), nheads_k)
    seqlens, headdim = (rng.randint(1, 300), rng.randint(1, 300)), rng.choice((8, 16, 40))
    dtype, batch = rng.choice((torch.float32, torch.bfloat16)), rng.choice((1, 2))
    qkv = random_qkv(seqlens, heads, headdim, dtype, batch, seed)
    visibility = Visibility(*seqlens, causal=rng.random() < 0.5, window_size=rng.choice(((-1, -1), (40, -1))))
    blocks = [rng.choice((16, 32, 48, 100)) for _ in range(2)]
    return qkv, Tiling(visibility, headdim**-0.5, 0.0, *blocks)


@pytest.mark.parametrize("seed", range(20))
def test_the_tiled_forward_moves_the_tile_sum_exactly(seed):
    (q, k, v), tiling = random_call(seed)
    with count_traffic() as traffic:
        tiled_forward(q, k, v, tiling)
    seqlen_q, headdim, size = q.shape[1], q.shape[3], q.element_size()
    visited = sum(
        len(keys)
        for queries in tiles(seqlen_q, tiling.block_q)
        for keys in tiling.visibility.key_tiles(queries, tiling.block_k)
    )
    assert traffic.per_head("q") == traffic.per_head("out") == seqlen_q * headdim * size
    assert traffic.per_head("k") == traffic.per_head("v") == visited * headdim * size  # for each KV head
    assert traffic.per_head("lse") == 4 * seqlen_q
    batch, nheads, nheads_k = q.shape[0], q.shape[2], k.shape[2]
    elements = batch * (nheads * 2 * seqlen_q * headdim + nheads_k * 2 * headdim * visited)
    assert traffic.total == elements * size + batch * nheads * 4 * seqlen_q


@pytest.mark.parametrize("seed", range(20))
def test_the_keys_first_order_moves_its_own_tile_sum_exactly(seed):
    (q, k, v), tiling = random_call(seed)
    with count_traffic() as traffic:
        tiled_forward_keys_first(q, k, v, tiling)
    seeing = [  # for each tile of keys, the queries in the tiles that see it
        sum(len(queries) for queries in tiles(q.shape[1], tiling.block_q) if tiling.visibility.sees(queries, keys))
        for keys in tiles(k.shape[1], tiling.block_k)
    ]
    used = sum(len(keys) for keys, rows in zip(tiles(k.shape[1], tiling.block_k), seeing, strict=True) if rows)
    row = q.shape[3] * q.element_size()
    assert traffic.per_head("k") == traffic.per_head("v") == used * row  # each tile once
    assert traffic.per_head("q") == sum(seeing) * row
    assert traffic.per_head("out") == (2 * sum(seeing) + q.shape[1]) * row  # read, write; and zeros at first
    assert traffic.per_head("lse") == 4 * (2 * sum(seeing) + q.shape[1])


@pytest.mark.parametrize("seed", range(8))
def test_both_orders_give_the_same_attention(seed):
    (q, k, v), tiling = random_call(seed)
    options = dict(causal=tiling.visibility.causal, window_size=tiling.visibility.window_size)
    naive = naive_attention(q, k, v, return_lse=True, **options)
    reference = naive_attention(*(x.double() for x in (q, k, v)), return_lse=True, **options)
    # Between two tiles of keys the result lies in HBM, rounded to q's dtype: each visit may add half a unit.
    visits = len(tiles(k.shape[1], tiling.block_k))
    for ours, plain, exact in zip(tiled_forward_keys_first(q, k, v, tiling), naive, reference, strict=True):
        assert_within_budget(ours, plain, exact, multiple=max(4, visits / 2))


def test_causal_tiles_above_the_diagonal_are_not_loaded():
    q, k, v = random_qkv((256, 256), (1, 1), 16)
    with count_traffic() as full:
        flash_attention(q, k, v, block_q=64, block_k=64)
    with count_traffic() as causal:
        flash_attention(q, k, v, causal=True, block_q=64, block_k=64)
    assert causal.read["k"] / full.read["k"] == 10 / 16  # 4 + 3 + 2 + 1 of 16 tiles


def test_what_is_on_the_chip_is_the_tiles_of_one_program():
    q, k, v = random_qkv((256, 256), (4, 2), 64, torch.bfloat16)
    with count_traffic() as traffic:
        flash_attention(q, k, v, block_q=64, block_k=32)
    rows = 2 * 64  # two query heads share a KV head
    q_tile, kv_tiles, scores, acc = rows * 64 * 2, 2 * 32 * 64 * 2, rows * 32 * 4, rows * 64 * 4
    assert traffic.peak_on_chip == q_tile + kv_tiles + scores + acc


def test_tiles_that_do_not_fit_are_refused_with_their_sizes():
    q, k, v = random_qkv((256, 256), (1, 1), 64)
    with count_traffic() as traffic:
        flash_attention(q, k, v, block_q=128, block_k=128)
    with count_traffic(sram=traffic.peak_on_chip):
        flash_attention(q, k, v, block_q=128, block_k=128)
    message = r"more than sram .*q 32 KiB, k 32 KiB, v 32 KiB.*: make them smaller"
    with pytest.raises(ValueError, match=message), count_traffic(sram=traffic.peak_on_chip - 1):
        flash_attention(q, k, v, block_q=128, block_k=128)


def test_outside_the_block_nothing_is_counted_and_a_load_is_a_view():
    q, k, v = random_qkv((64, 64), (1, 1), 8)
    with count_traffic() as traffic:
        flash_attention(q, k, v)
    before = traffic.total
    flash_attention(q, k, v)
    assert traffic.total == before
    assert Counted(q).load(slice(0, 1)).untyped_storage().data_ptr() == q.untyped_storage().data_ptr()


def test_an_error_inside_the_block_ends_the_counting():
    with pytest.raises(RuntimeError), count_traffic() as traffic:
        raise RuntimeError
    flash_attention(*random_qkv((8, 8), (1, 1), 8))
    assert traffic.total == 0


def test_a_function_of_ones_own_is_counted_and_its_tiles_leave_the_chip_with_their_names():
    traffic_of_rows = 64 * 16 * 4

    def scale(x, out, block):
        for start in range(0, x.shape[0], block):
            tile = x.load(slice(start, start + block))
            out.store(tile * 2, slice(start, start + block))
            del tile

    with count_traffic(sram=8 * 16 * 4) as traffic:
        x, out = torch.randn(64, 16), torch.zeros(64, 16)
        scale(traffic.tensor("x", x), traffic.tensor("out", out), block=8)
        assert torch.equal(out, x * 2)
        assert traffic.read["x"] == traffic.written["out"] == traffic_of_rows
        assert traffic.peak_on_chip == 8 * 16 * 4
        with pytest.raises(ValueError, match="more than sram 512 B"):
            scale(traffic.tensor("x", x), traffic.tensor("out", out), block=9)


def test_a_counted_tensor_cannot_be_computed_with_before_it_is_loaded():
    counted = Counted(torch.ones(4, 4))
    with pytest.raises(TypeError):
        counted @ counted  # type: ignore[operator]
    with pytest.raises(TypeError):
        torch.softmax(counted, -1)  # type: ignore[call-overload]


def test_unfused_operators_read_their_inputs_and_write_their_results():
    q, k, v = torch.randn(3, 2, 64, 16)  # (heads, seqlen, headdim)
    calls = count_operators(lambda: torch.softmax(q @ k.transpose(1, 2), -1) @ v)
    n_d, n_n = 2 * 64 * 16 * 4, 2 * 64 * 64 * 4
    assert calls == [("bmm", 2 * n_d, n_n), ("_softmax", n_n, n_n), ("bmm", n_n + n_d, n_d)]


def test_small_tiles_move_more_than_the_unfused_formula():
    """The order of FlashAttention-2 crosses the unfused 4·N² + 4·N·d at block_q = d / 2."""
    q, k, v = random_qkv((1024, 1024), (1, 1), 64)
    unfused = (4 * 1024 * 1024 + 4 * 1024 * 64) * 4
    ratios = {}
    for block_q in (16, 32):
        with count_traffic() as traffic:
            flash_attention(q, k, v, block_q=block_q, block_k=64)
        ratios[block_q] = (traffic.total - traffic.written["lse"]) / unfused
    assert ratios[16] > 1.8 and 0.9 < ratios[32] < 1.0
