"""The widgets without a front end: each control moves the picture, and what the picture counts is true."""

import base64
import html

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from ipywidgets import IntSlider, SelectionSlider

from course import widgets
from course.widgets import cache, explorer, softmax, walk
from minillm.attention import flash_attention
from minillm.attention.masks import Visibility, tiles
from minillm.measure import count_operators, count_traffic, format_bytes

VIEW = "application/vnd.jupyter.widget-view+json"
GENERATOR = torch.Generator().manual_seed(0)
MAPS = list(torch.randn(3, 2, 5, 5, generator=GENERATOR).softmax(-1))
TOKENS = ["My", "dish", "is", "<b>", "."]
SCORES = torch.tensor([-0.5, 1.0, -torch.inf, 3.0, 2.0])
VALUES = torch.randn(5, 4, generator=GENERATOR)

CALLS = {
    "attention_maps": lambda: widgets.attention_maps(MAPS, TOKENS, layer=1, head=1),
    "online_softmax": lambda: widgets.online_softmax(SCORES, TOKENS),
    "online_softmax with values": lambda: widgets.online_softmax(SCORES, TOKENS, VALUES, step=3),
    "tile_walk": lambda: widgets.tile_walk(32, 32, 16, block_q=16, causal=True),
    "tile_walk, ragged, with queries that see nothing": lambda: widgets.tile_walk(70, 40, 16, block_k=24, causal=True),
    "program_grid": lambda: widgets.program_grid(64, 64, block_q=16, program=2),
    "cache_filling": lambda: widgets.cache_filling((5, 2), 9),
}


def show(call):
    """Runs a call as a lesson's cell does and returns what it displays."""
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "display", shown.append)
        assert call() is None  # or a cell would show it twice
    (widget,) = shown
    return widget


@pytest.fixture(scope="module", params=CALLS)
def widget(request):
    return show(CALLS[request.param])


def positions(control):
    """All that a reader can set a control to."""
    if isinstance(control, IntSlider):
        return range(control.min, control.max + 1)
    return control.options if isinstance(control, SelectionSlider) else [True, False]


def test_each_control_changes_the_picture_and_its_words_at_each_of_its_positions(widget):
    for name, control in widget.controls.items():
        pictures, texts = set(), set()
        for position in positions(control):
            control.value = position
            picture = bytes(widget.picture.value)
            assert picture.startswith(b"\x89PNG") and len(picture) <= 60_000
            assert html.escape(widget.alt) in widget.text.value
            pictures.add(picture)
            texts.add(widget.text.value)
        assert len(pictures) == len(texts) == len(positions(control)) > 1, name


def test_each_control_has_a_name_of_its_own(widget):
    names = [control.description for control in widget.controls.values()]
    assert all(names) and len(set(names)) == len(names)


def test_a_front_end_gets_the_widget_and_a_page_gets_its_picture_with_alt_text(widget):
    data, metadata = DisplayFormatter().format(widget)
    assert data[VIEW]["model_id"] == widget.model_id
    assert isinstance(data["image/png"], bytes) and data["image/png"] == widget.picture.value
    assert metadata["image/png"]["alt"] == data["text/plain"] == widget.alt
    encoded = base64.b64encode(widget.picture.value).decode()
    assert data["text/html"] == f'<img alt="{html.escape(widget.alt)}" src="data:image/png;base64,{encoded}">'
    assert len(widget.alt) > 20


def test_the_stored_picture_is_the_one_that_was_asked_for():
    asked = show(CALLS["attention_maps"])
    moved = show(lambda: widgets.attention_maps(MAPS, TOKENS))
    moved.controls["layer"].value, moved.controls["head"].value = 1, 1
    assert asked.picture.value == moved.picture.value and "Layer 1, head 1" in asked.alt


def test_a_token_is_text_and_not_markup():
    words = softmax._in_words(4, SCORES, TOKENS, softmax.online_states(SCORES))
    shown = explorer.Explorer("any", lambda step: (b"", words), {"step": IntSlider()})
    assert "“<b>”" in shown.alt and "“&lt;b&gt;”" in shown.text.value


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="want"):
        widgets.attention_maps(MAPS, TOKENS[:-1])
    with pytest.raises(ValueError, match="want"):
        widgets.online_softmax(SCORES, TOKENS[:-1])
    with pytest.raises(ValueError, match="masked"):
        widgets.online_softmax(torch.full((5,), -torch.inf), TOKENS)


def test_the_steppers_last_state_is_softmax():
    last = softmax.online_states(SCORES, VALUES)[-1]
    right = SCORES.softmax(-1)
    torch.testing.assert_close((SCORES - last.m).exp() / last.l, right)
    torch.testing.assert_close(last.acc / last.l, right @ VALUES)


def test_each_state_follows_from_the_one_before_by_the_rescale_that_is_shown():
    states = softmax.online_states(SCORES, VALUES)
    assert len(states) == len(SCORES) + 1
    for score, value, last, state in zip(SCORES, VALUES, states, states[1:], strict=False):
        p = (score - state.m).exp()
        assert state.l == pytest.approx(state.rescale * last.l + p.item())
        torch.testing.assert_close(state.acc, state.rescale * last.acc + p * value)


def test_the_stepper_says_whether_a_score_is_larger_smaller_or_masked():
    states = softmax.online_states(SCORES)
    said = ["Nothing is seen", "the first", "larger than m = −0.500", "masked", "larger than m = 1.000", "not larger"]
    for step, words in enumerate(said):
        assert words in softmax._in_words(step, SCORES, TOKENS, states)


WALKS = [
    (64, 64, 16, 16, 16, False),
    (64, 64, 16, 32, 16, True),
    (50, 70, 8, 32, 24, True),  # tails on both sides
    (70, 20, 8, 16, 16, True),  # whole tiles of queries see nothing
    (1, 90, 8, 16, 32, True),  # decode
]


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_the_walks_counter_ends_at_what_count_traffic_counts(case):
    seqlen_q, seqlen_k, headdim, block_q, block_k, causal = case
    q = torch.randn(1, seqlen_q, 1, headdim).bfloat16()
    k, v = torch.randn(2, 1, seqlen_k, 1, headdim).bfloat16()
    with count_traffic() as traffic:
        flash_attention(q, k, v, causal=causal, block_q=block_q, block_k=block_k)
    counted = walk.counted_walk(*case)
    assert counted.moved[-1] == traffic.read + traffic.written
    assert counted.moved[-1].total() == traffic.total and counted.on_chip == traffic.peak_on_chip
    words = walk._in_words(counted, len(counted.visits), 1)
    assert f"Moved so far {format_bytes(traffic.total)} of {format_bytes(traffic.total)};" in words


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_each_tile_of_the_walk_reads_its_own_keys_and_values(case):
    headdim = case[2]
    _, visits, moved, _ = walk.counted_walk(*case)
    assert len(moved) == len(visits) + 1
    for (_, keys), before, after in zip(visits, moved, moved[1:], strict=False):
        for name in ("k", "v"):
            assert after[name] - before[name] == 2 * len(keys) * headdim
    assert moved[-1]["out"] == 2 * case[0] * headdim and moved[-1]["lse"] == 4 * case[0]


def test_what_a_walk_writes_is_counted_when_its_last_tile_is_done():
    _, visits, moved, _ = walk.counted_walk(64, 64, 16, 32, 32, causal=True)
    assert [keys.start for _, keys in visits] == [0, 0, 32]
    assert [count["out"] for count in moved] == [0, 2 * 32 * 16, 2 * 32 * 16, 2 * 64 * 16]


def test_the_unfused_formula_moves_four_times_the_scores_and_q_k_v_o():
    assert walk.unfused_bytes(64, 64, 16) == 2 * (4 * 64 * 64 + 4 * 64 * 16)
    x = torch.randn(64, 16).bfloat16()
    calls = count_operators(lambda: torch.softmax(x @ x.T, dim=-1) @ x)
    assert walk.unfused_bytes(64, 64, 16) == sum(read + written for _, read, written in calls)


def test_a_slider_at_the_end_of_a_walk_stays_there_under_another_tiling():
    shown = show(lambda: widgets.tile_walk(64, 64, 16, block_q=32, block_k=32, step=4))
    step = shown.controls["step"]
    for name, value, count in (("block_k", 64, 2), ("block_q", 16, 4), ("causal", True, 4), ("block_k", 16, 10)):
        shown.controls[name].value = value
        assert step.value == step.max == count
        assert f"Tile {count} of {count}" in shown.alt


@pytest.mark.parametrize("seqlens", [(64, 64), (50, 70), (70, 20)], ids=str)
def test_the_drawn_mask_is_the_mask(seqlens):
    visibility = Visibility(*seqlens, causal=True)
    for queries in tiles(seqlens[0], 16):
        for keys in visibility.key_tiles(queries, 16):
            mask = visibility.mask(queries, keys)
            assert visibility.sees_all(queries, keys) == (mask is None)
            if mask is not None:
                assert area(walk._hidden_part(queries, keys, visibility)) == (~mask).sum()


def area(corners):
    """Of a polygon, by the shoelace formula."""
    following = [*corners[1:], corners[0]]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, following, strict=True))) / 2


def test_the_filling_cache_is_the_one_that_the_library_fills():
    states = cache.filled_cache((5, 2), 9, 4, 2)
    assert [state.lengths for state in states] == [[0, 0], *([5 + i, 2 + i] for i in range(10))]
    assert sorted({state.capacity for state in states}) == [4, 8, 14]
    for state in states:
        assert state.nbytes == 4 * 2 * 2 * state.capacity * 2 * 32 * 4
        assert state.used == 4 * 2 * sum(state.lengths) * 2 * 32 * 4


def test_the_filling_cache_says_when_it_grew():
    first, _, *rest = (cache._in_words(i, s, b, 2) for i, (s, b) in enumerate(_pairs()))
    assert first.startswith("Nothing is computed") and sum("It was full" in words for words in rest) == 1


def _pairs():
    states = cache.filled_cache((5, 2), 9, 4, 2)
    return zip(states, states[:1] + states, strict=False)
