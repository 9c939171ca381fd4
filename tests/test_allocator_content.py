"""Contents and histories: their keys tell equal blocks from different ones exactly as token by token."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.content import ChunkContent, Content, History, TokenContent, UniqueContent
from allocator.manager import KVCacheManager
from allocator.shadow import PromptSpec, ShadowKV, Story

sizes = st.sampled_from([1, 2, 4, 8])


def split_keys(keys: bytes, history: History) -> list[bytes]:
    width = history.key_width
    assert len(keys) % width == 0
    return [keys[i : i + width] for i in range(0, len(keys), width)]


specs = st.builds(
    PromptSpec,
    kind=st.sampled_from(["runs", "tokens", "chunks", "unique"]),
    symbols=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    cut=st.integers(0, 7),
    named=st.booleans(),
    granularity=st.integers(1, 12),
)
# What a sequence does: say tokens (named or not), fork or truncate at a place, or start again as a new request.
moves = st.lists(
    st.tuples(st.sampled_from(["say", "name", "fork", "truncate", "resume"]), st.integers(0, 30)), max_size=8
)


class Teller:
    """A history beside the story that says the same, token by token."""

    def __init__(self, content: Content, story: Story, size: int) -> None:
        self.history = content.history(size)
        self.family = content.family()
        self.story = story
        self.size = size
        story.say(story.prompt)

    def blocks(self) -> list[tuple[Hashable, bytes, int]]:
        """Return (family, keys of the prefix, history) of every full block."""
        story, history = self.story, self.history
        full = story.length // self.size
        keys = history.keys(0, full)
        assert keys == b"".join(history.keys(i, i + 1) for i in range(full)), (
            "keys depend on how they are asked for"
        )
        states = story.full_states()
        return [(self.family, keys[: (i + 1) * history.key_width], states[i]) for i in range(full)]

    def move(self, what: str, amount: int) -> Teller:
        story = self.story
        if what == "say" or (what == "name" and not isinstance(self.family, str)):
            story.say(1 + amount % 9)
        elif what == "name":
            named = [amount >> i & 1 for i in range(1 + amount % 5)]
            self.history.record(story.length, named)
            story.say(len(named), named)
        elif what == "fork":
            self.history, self.story = self.history.diverge(story.length), story.fork()
            self.story.prompt = story.length
        elif what == "truncate":
            length = 1 + amount % story.length
            if length < story.length:
                story.truncate(length)
                self.history = self.history.diverge(length)
        else:
            content = self.history.content(story.length)
            assert content.family() == self.family
            assert content.num_prompt_tokens == story.length
            width, full = self.history.key_width, story.length // self.size
            assert content.prompt_keys(self.size) == self.history.keys(0, full)
            self.history = content.history(self.size)
            assert self.history.key_width == width
        return self


@given(size=sizes, tellers=st.lists(st.tuples(specs, moves), min_size=1, max_size=4))
def test_keys_are_equal_exactly_where_all_tokens_are(size: int, tellers: list[tuple]) -> None:
    shadow = ShadowKV(size)
    found: list[tuple[Hashable, bytes, int]] = []
    for spec, steps in tellers:
        prompt = spec.make(size)
        again = Teller(prompt.content, Story(shadow, "", list(prompt.tokens), prompt.num_tokens), size)
        teller = Teller(prompt.content, Story(shadow, "", list(prompt.tokens), prompt.num_tokens), size)
        full = prompt.num_tokens // size
        assert prompt.content.prompt_keys(size) == teller.history.keys(0, full)
        for what, amount in steps:
            teller.move(what, amount)
            found += teller.blocks()
        found += teller.blocks() + again.blocks()
    by_key: dict[tuple[Hashable, bytes], int] = {}
    by_state: dict[int, tuple[Hashable, bytes]] = {}
    for family, keys, state in found:
        assert by_key.setdefault((family, keys), state) == state, "equal keys, other tokens"
        assert by_state.setdefault(state, (family, keys)) == (family, keys), "equal tokens, other keys"


@pytest.mark.parametrize("granularity", [1, 2, 3, 5, 6, 8, 12, 16, 512])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
def test_chunks_and_blocks_are_independent(granularity: int, size: int) -> None:
    """Two prompts that agree on k chunks share exactly the blocks that end within them."""
    rng = np.random.default_rng(granularity * 1000 + size)
    chunks = 3 + 200 // granularity
    ids = rng.integers(0, 2**40, chunks)
    agree = int(rng.integers(0, chunks))
    other = ids.copy()
    other[agree:] += 1
    tokens = chunks * granularity - int(rng.integers(0, granularity))
    one, two = (ChunkContent(x, granularity, tokens).history(size) for x in (ids, other))
    shared = [
        a == b for a, b in zip(*(split_keys(h.keys(0, tokens // size), h) for h in (one, two)), strict=True)
    ]
    assert sum(shared[: agree * granularity // size]) == min(agree * granularity, tokens) // size
    # the block in which they part differs; later ones may look alike, but never follow an equal prefix
    assert not any(shared[agree * granularity // size : agree * granularity // size + 1])


def test_a_manager_shares_prefixes_at_any_granularity() -> None:
    for granularity in (1, 3, 8, 24):
        manager = KVCacheManager(64, 8)
        first = ChunkContent(range(20), granularity, 20 * granularity if granularity < 24 else 200)
        manager.release(manager.admit(first, first.num_prompt_tokens))
        ids = [*range(5), 99, 98, 97]
        second = ChunkContent(ids, granularity, 8 * granularity)
        match = manager.lookup(second)
        assert match.hit_blocks == 5 * granularity // 8


def test_a_content_looked_up_twice_equals_itself() -> None:
    content = UniqueContent(9)
    assert content.prompt_keys(4) == content.prompt_keys(4) == content.history(4).keys(0, 2)
    assert content.prompt_keys(4) != UniqueContent(9).prompt_keys(4)


def test_two_sequences_of_one_content_part_after_the_prompt() -> None:
    for content in (TokenContent([1, 2, 3, 4]), ChunkContent([7], 4, 4), UniqueContent(4)):
        one, two = content.history(2), content.history(2)
        assert one.keys(0, 2) == two.keys(0, 2)
        assert one.keys(2, 3) != two.keys(2, 3)
        assert one.keys(2, 3) == one.keys(2, 3)


def test_named_tokens_beyond_the_prompt_survive_a_preemption() -> None:
    for content in (TokenContent([1, 2, 3, 4, 5, 6], 2), ChunkContent([1, 2, 3], 2, 2, 6)):
        whole = content.history(2).keys(0, 3)
        resumed = content.history(2).content(4)
        assert resumed.num_prompt_tokens == 4
        assert resumed.history(2).keys(0, 3) == whole


def test_a_fork_before_unnamed_tokens_were_keyed_keeps_them() -> None:
    parent = ChunkContent([3, 3, 3], 1, 3).history(8)
    child = parent.diverge(6)
    np.full(1000, -1, dtype=np.int64)  # whatever memory held must not show in a key
    key = np.frombuffer(child.keys(0, 1), np.int64)
    assert key[:3].tolist() == [3, 3, 3]
    assert len(set(key[3:6].tolist())) == 1
    assert key[3] < 0
    assert key[3] != key[6] == key[7]
    assert np.frombuffer(parent.keys(0, 1), np.int64)[3:6].tolist() == key[3:6].tolist()


def test_recorded_tokens_replace_unnamed_ones() -> None:
    history = TokenContent([1, 2]).history(4)
    history.record(3, [8])
    named = TokenContent([1, 2, 0, 8]).history(4)
    assert history.keys(0, 1)[:8] == named.keys(0, 1)[:8]
    assert history.keys(0, 1)[12:] == named.keys(0, 1)[12:]
    assert history.keys(0, 1) != named.keys(0, 1)
    with pytest.raises(ValueError, match="content of chunks"):
        ChunkContent([1], 4, 4).history(4).record(4, [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenContent([]), r"num_prompt_tokens \(0\) must be at least 1"),
        (lambda: TokenContent([1, -2]), r"token_ids \(-2\) must not be negative"),
        (lambda: TokenContent([1, 2], 3), r"token_ids \(2 of them\) must cover the prompt \(3\)"),
        (lambda: TokenContent(np.array([1, 2**31])), r"token_ids \(2147483648\)"),
        (lambda: TokenContent([1, 2**31]), r"token_ids \(2147483648\) must be less than 2\*\*31"),
        (lambda: TokenContent([1, 2**40]), r"token_ids must all be less than 2\*\*31"),
        (lambda: TokenContent([1, -(2**31)]), r"token_ids \(-2147483648\) must not be negative"),
        (lambda: TokenContent([1, 2.5]), "token_ids must be integers: "),
        (lambda: ChunkContent([1], 4, 5), r"chunk_ids \(1\) must cover 5 tokens in chunks of 4"),
        (lambda: ChunkContent([1, -1], 4, 5), r"chunk_ids \(-1\) must not be negative"),
        (lambda: ChunkContent([1], 0, 5), r"granularity \(0\) must be at least 1"),
        (lambda: ChunkContent([1, 2], 4, 5, 3), r"num_named_tokens \(3\) must cover the prompt \(5\)"),
        (lambda: UniqueContent(0), r"num_prompt_tokens \(0\) must be at least 1"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_token_ids_come_in_any_integer_type() -> None:
    keys = TokenContent([1, 2, 3]).prompt_keys(1)
    for dtype in (np.int16, np.int32, np.int64, np.uint8):
        assert TokenContent(np.array([1, 2, 3], dtype=dtype)).prompt_keys(1) == keys
        assert TokenContent(np.array([1, 0, 2, 0, 3, 0], dtype=dtype)[::2]).prompt_keys(1) == keys
