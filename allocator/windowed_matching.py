"""Looking a prompt up in a windowed cache: a hit needs sinks and window before its end, not what lies between."""

from __future__ import annotations

from collections.abc import Hashable

from allocator.content import Content
from allocator.matching import PrefixMatch
from allocator.partial import PartialReuse
from allocator.prefilling import Prefilling
from allocator.prefix import Extent
from allocator.windowed_index import WindowedIndex
from allocator.windows import AttentionWindow


def find_windowed_match(
    index: WindowedIndex,
    content: Content,
    salt: Hashable,
    window: AttentionWindow,
    prefilling: Prefilling,
    partial_reuse: PartialReuse | None = None,
) -> PrefixMatch:
    """Look a prompt up. Changes nothing.

    A prompt hits up to block d if all blocks that the query right behind it needs are cached. Of what it misses,
    `last_token` is what would be hit if the last token had not to be computed; for other causes, a block counts
    as missed for what keeps the prompt from hitting up to it.
    """
    size = window.tokens_per_block
    prompt = content.num_prompt_tokens
    full = prompt // size
    usable = (prompt - 1) // size  # the last token is always computed
    keys = content.prompt_keys(size)
    salts = index.roots.get(content.family(), {})
    root = salts.get(salt)

    nodes = index.walk(root, keys) if root is not None else []
    hit = deepest_hit(nodes[:usable], window)
    reached = deepest_hit(nodes[:full], window)
    misses: dict[str, int] = {}
    computed_by = None
    if reached > hit:
        misses["last_token"] = reached - hit
    if prompt % size:
        misses["short_of_block"] = 1
    if reached < full:
        others = [index.walk(other, keys) for other in salts.values() if other is not root]
        isolated = max((deepest_hit(walked, window) for walked in others), default=0)
        in_flight = 0
        if root is not None and prefilling:
            in_flight, computed_by = prefilling.ahead(root, [(node, 1) for node in nodes], keys)
            if in_flight <= reached:
                computed_by = None
        evicted = max((node.end for node in nodes[reached:] if index.is_known(node)), default=0)
        for cause, end in (("isolated", isolated), ("in_flight", in_flight), ("evicted", evicted)):
            if end > reached:
                misses[cause] = end - reached
                reached = end
        if full > reached:
            misses["unknown" if index.forgot else "cold"] = full - reached
    query_blocks = -(-prompt // size)
    partial = None
    if partial_reuse is not None and root is not None:
        # At once it needs all its blocks, if it is computed in one go, or else those of a window.
        blocks = query_blocks if query_blocks <= partial_reuse.num_blocks else window.blocks_held(prompt)
        parent, at = (nodes[hit - 1], 1) if hit else (root, 0)
        partial = partial_reuse.find_hit(parent, at, content, size, hit, blocks)
    held = nodes[: min(window.sink_blocks, hit)] + nodes[window.first_needed(hit * size) : hit]
    return PrefixMatch(
        index,
        content,
        salt,
        [(node, 1) for node in held],
        None,
        hit,
        hit * size + (0 if partial is None else partial.num_tokens),
        query_blocks,
        misses,
        index.version,
        partial=partial,
        computed_by=computed_by,
        host_blocks=sum(not node.ids for node in held),
    )


def deepest_hit(nodes: list[Extent], window: AttentionWindow) -> int:
    """Return the greatest number of blocks behind which a query finds all that it needs; 0 if there is none."""
    size, sinks = window.tokens_per_block, window.sink_blocks
    deepest = in_a_row = 0
    for depth, node in enumerate(nodes, 1):
        if node.ids or node.host is not None:
            in_a_row += 1
            if in_a_row >= depth - window.first_needed(depth * size):
                deepest = depth
        elif depth <= sinks:
            break
        else:
            in_a_row = 0
    return deepest
