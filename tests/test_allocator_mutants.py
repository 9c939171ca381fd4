"""Planted bugs: each has to be found by the fuzz machines, or the machines are worth nothing.

A mutant is a change of source text. It is applied to a copy of the package, and the machines of that copy run in
a process of their own. Text that is no longer there fails the test: the mutant has to follow the code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import allocator

STEPS = 20_000
"""Per machine, at most; nearly all bugs are found within some hundreds."""

RUNNER = """
from pathlib import Path
from allocator import fuzz

assert Path(fuzz.__file__).is_relative_to(Path.cwd()), fuzz.__file__
for name in sys.argv[2:]:
    tally = fuzz.Tally()
    try:
        fuzz.run_machine(getattr(fuzz, name), int(sys.argv[1]), 1, tally=tally)
    except (NameError, ImportError):
        raise  # the mutant itself is broken
    except Exception as error:
        print(f"killed by {name} after {tally.steps} steps: {type(error).__name__} {error}".splitlines()[0])
        break
else:
    print("survived")
"""

SERVER = """
import json, os, signal, sys
import hypothesis.stateful, numpy  # they take time to import, and no mutant changes them

for folder, *arguments in map(json.loads, sys.stdin):
    if os.fork() == 0:
        signal.alarm(300)
        os.chdir(folder)
        said = os.open("said", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        runner, sys.argv[1:] = sys.argv[1], arguments
        exec(runner)
        break
    print(os.wait()[1], flush=True)
"""
"""Answers each line, a folder and the runner's arguments, with the exit status of a process of its own."""


@dataclass(frozen=True)
class Mutant:
    """Replace `old`, which occurs once in `file`, by `new`; `machines` are tried in turn."""

    name: str
    file: str
    old: str
    new: str
    machines: str = "AllocatorMachine"


MUTANTS = [
    Mutant(
        "date_of_one_evicted_block_dropped",
        "prefix.py",
        "                drop_last(extent.born, num_blocks)\n",
        "                drop_last(extent.born, 1)\n",
        "ReuseMachine",
    ),
    Mutant(
        "split_head_born_as_whole",
        "prefix.py",
        "            head.born = cut_first(extent.born, at)\n",
        "            head.born = extent.born[:]\n",
        "ReuseMachine",
    ),
    Mutant(
        "part_of_an_extent_lived_as_whole",
        "lifetimes.py",
        "born if num_blocks == len(extent.ids) else last(born, num_blocks)",
        "born",
        "ReuseMachine",
    ),
    Mutant(
        "part_of_a_run_lived_as_whole",
        "births.py",
        "        found[0] -= before  # only some of that run\n",
        "        pass\n",
        "ReuseMachine",
    ),
    Mutant(
        "copy_on_write_skipped",
        "tables.py",
        "        tail = self.shared_tail(sequence)\n        if tail is None:\n            return\n",
        "        return\n",
        "SharingMachine",
    ),
    Mutant(
        "hit_block_freed_by_taking_first",
        "admission.py",
        "            anchor, table = self._take_hits(match, root, number, not readmission)\n",
        "            pool.give(pool.take(new_blocks))\n"
        "            anchor, table = self._take_hits(match, root, number, not readmission)\n",
        "ReuseMachine",
    ),
    Mutant(
        "released_head_first",
        "pool.py",
        "        parent = extent.parent\n        while parent is not None:\n            self.drop(extent)\n",
        "        parent = extent.parent\n        for each in reversed(list(extent.path())):\n            self.drop(each)\n"
        "        while parent is not None:\n",
        "ReuseMachine",
    ),
    Mutant(
        "slot_off_by_one",
        "sequence.py",
        "* size + positions % size",
        "* size + (positions + 1) % size",
        "ReuseMachine",
    ),
    Mutant(
        "registered_under_the_wrong_parent",
        "prefix.py",
        "                anchor = child\n                at += matched\n",
        "                at += matched\n",
        "ReuseMachine",
    ),
    Mutant(
        "child_registered_under_the_root",
        "admission.py",
        "            table.extend(extent.ids)\n            anchor = extent\n",
        "            table.extend(extent.ids)\n",
        "ReuseMachine",
    ),
    Mutant(
        "stale_entry_after_eviction",
        "prefix.py",
        "            ids = extent.ids[keep:]\n            del extent.ids[keep:]\n",
        "            ids = extent.ids[keep:]\n",
        "ReuseMachine",
    ),
    Mutant(
        "evicted_block_still_counts_as_computed",
        "matching.py",
        "        if extent.ids or extent.host:\n            live += blocks\n",
        "        if extent.keys:\n            live += blocks\n",
        "ReuseMachine",
    ),
    Mutant(
        "hit_block_reset_on_touch",
        "pool.py",
        "        self.acquire(extent)\n        extent.sealed = True\n",
        "        self.acquire(extent)\n        extent.references = 1\n",
        "ReuseMachine",
    ),
    Mutant(
        "nothing_left_to_compute_on_a_full_hit",
        "matching.py",
        "usable = (prompt - 1) // tokens_per_block",
        "usable = prompt // tokens_per_block",
        "ReuseMachine",
    ),
    Mutant(
        "duplicate_freed_under_its_table",
        "tables.py",
        "                sequence.add_twins(range(extent.start, extent.end))\n",
        "                self.pool.give(sequence.table[extent.start : extent.end])\n",
        "ReuseMachine",
    ),
    Mutant(
        "shared_blocks_counted_as_evictable",
        "matching.py",
        "        self.held, self.idle = held, idle\n        return idle\n",
        "        return sum(blocks for _, blocks in path)\n",
        "ReuseMachine",
    ),
    Mutant(
        "hits_not_counted_against_what_is_available",
        "matching.py",
        "        self.held, self.idle = held, idle\n        return idle\n",
        "        return 0\n",
        "ReuseMachine",
    ),
    Mutant(
        "tokens_of_a_hit_as_if_blocks_had_one",
        "sequence.py",
        "return self.hit_blocks * self.settled_history.tokens_per_block + self.partial_tokens",
        "return self.hit_blocks + self.partial_tokens",
        "ReuseMachine",
    ),
    Mutant(
        "fork_frees_a_live_block",
        "tables.py",
        "[block for block in blocks if not pool.unshare(block)]",
        "[block for block in blocks if pool.unshare(block) or True]",
        "SharingMachine",
    ),
    Mutant(
        "truncation_frees_the_block_it_cuts",
        "sharing.py",
        "        keep = -(-num_tokens // size)\n        self.tables.free_private(sequence, keep)\n",
        "        keep = -(-num_tokens // size)\n        self.tables.free_private(sequence, num_tokens // size)\n",
        "SharingMachine",
    ),
    Mutant(
        "partial_block_becomes_evictable",
        "admission.py",
        "        full = num_tokens // self.tokens_per_block\n        if full > sequence.anchor.end:",
        "        full = -(-num_tokens // self.tokens_per_block)\n        if full > sequence.anchor.end:",
        "ReuseMachine",
    ),
    Mutant(
        "double_free_on_abort",
        "sharing.py",
        "        self.tables.release(sequence)\n        self.logical_blocks",
        "        self.tables.free_private(sequence, sequence.anchored)\n        self.tables.release(sequence)\n"
        "        self.logical_blocks",
        "ReuseMachine",
    ),
    Mutant(
        "refused_append_leaves_traces",
        "decoding.py",
        "        self._check_room(self._blocks_to_advance(sequences, num_tokens), sequences)\n        if self.quotas",
        "        self._check_room(self._growth(sequences, num_tokens), sequences)\n        if self.quotas",
        "SharingMachine",
    ),
    Mutant(
        "stale_match_used",
        "admission.py",
        "return match.index is self.index and match.version == self.index.version",
        "return True",
        "ReuseMachine",
    ),
    Mutant(
        "copy_of_too_few_tokens",
        "tables.py",
        "self.copies.add(source, destination, valid, extent)",
        "self.copies.add(source, destination, valid - 1, extent)",
        "SharingMachine",
    ),
    Mutant(
        "copied_source_not_kept",
        "copies.py",
        "        if extent is None:\n            self._pin(source)\n",
        "        if extent is None:\n            pass\n",
        "SharingMachine AllocatorMachine",
    ),
    Mutant(
        "salt_ignored",
        "admission.py",
        "index.root(content.family(), salt, history.key_width)",
        'index.root(content.family(), "", history.key_width)',
        "ReuseMachine",
    ),
    Mutant(
        "fork_says_what_its_parent_says",
        "sharing.py",
        "sequence.history.diverge(max(tokens, sequence.num_prompt_tokens)),",
        "sequence.history,",
        "SharingMachine",
    ),
    Mutant(
        "truncated_sequence_keeps_its_stream",
        "sharing.py",
        "        sequence.history = sequence.history.diverge(num_tokens)\n",
        "",
        "SharingMachine",
    ),
    Mutant(
        "beams_forget_to_swap_their_content",
        "sharing.py",
        '    "history",\n    "anchor",',
        '    "anchor",',
        "SharingMachine",
    ),
    Mutant(
        "batch_member_not_checked_after_a_fork",
        "sharing.py",
        "        if sequence.batch is not None:\n            sequence.batch.unready[sequence] = None\n        return children",
        "        return children",
        "BatchMachine",
    ),
    Mutant(
        "batch_counts_a_tick_too_few",
        "batch.py",
        "sum(map(len, self._starting_within(rest)))",
        "sum(map(len, self._starting_within(rest - 1)))",
        "BatchMachine",
    ),
    Mutant(
        "fork_free_of_charge",
        "sharing.py",
        "            sequence.tenant.blocks += n * len(sequence.table)\n",
        "            sequence.tenant.blocks += n\n",
        "QuotaMachine",
    ),
    Mutant(
        "batch_beyond_its_quota",
        "decoding.py",
        "            self.quotas.require(demands + self._given_up(batch))\n",
        "",
        "QuotaMachine",
    ),
    Mutant(
        "split_head_unreferenced",
        "prefix.py",
        "        head.references = extent.references\n",
        "",
        "ReuseMachine",
    ),
    Mutant(
        "revived_ghost_not_counted_as_a_child",
        "prefix.py",
        "        ghost.sealed = False\n        ghost.parent.live_children += 1\n",
        "        ghost.sealed = False\n",
        "ReuseMachine",
    ),
    Mutant(
        "lru_keeps_what_is_referenced_again",
        "eviction/lru.py",
        "        self._order.pop(extent, None)\n\n    def evicted",
        "        pass\n\n    def evicted",
        "ReuseMachine",
    ),
    Mutant(
        "fifo_takes_what_is_gone",
        "eviction/fifo.py",
        "        if not extent.ids:\n            self._exposed.discard(extent)\n",
        "        if not extent.ids:\n            pass\n",
        "ReuseMachine",
    ),
    Mutant(
        "eviction_not_logged",
        "pool.py",
        "            self.events.add_blocks(EVICTED, NOBODY, -1, -1, self._freed[left:before][::-1])\n",
        "            pass\n",
        "EventsMachine",
    ),
    Mutant(
        "ends_of_a_copy_logged_the_wrong_way_round",
        "tables.py",
        'COPIED, sequence.number, -1, valid, array("i", (source, destination))',
        'COPIED, sequence.number, -1, valid, array("i", (destination, source))',
        "EventsMachine",
    ),
    Mutant(
        "block_filled_by_decoding_not_logged",
        "tables.py",
        "                    events.add_block(STORED, sequence.number, anchor.ids[-1], len(table) - 1, table[-1])\n",
        "                    pass\n",
        "EventsMachine",
    ),
    Mutant(
        "batch_logs_one_tick_for_several",
        "decoding.py",
        "self.events.add(ADVANCED, NOBODY, batch.number, num_tokens)",
        "self.events.add(ADVANCED, NOBODY, batch.number, 1)",
        "EventsMachine",
    ),
    Mutant(
        "exchange_of_beams_not_logged",
        "sharing.py",
        "                self.events.add(EXCHANGED, sequences[i].number, heir.number)\n",
        "                pass\n",
        "EventsMachine",
    ),
    Mutant(
        "copies_handed_out_unlogged",
        "copies.py",
        "            self.events.add(EXECUTED, value=len(copies))\n",
        "            pass\n",
        "EventsMachine",
    ),
    Mutant(
        "detachment_not_logged",
        "tables.py",
        "            self.events.add(DETACHED, sequence.number, value=end)\n",
        "            pass\n",
        "EventsMachine",
    ),
    Mutant(
        "block_taken_out_of_the_index_unlogged",
        "tables.py",
        "                self.events.add_block(UNSTORED, sequence.number, -1, -1, tail)\n",
        "                pass\n",
        "EventsMachine",
    ),
    Mutant(
        "part_copied_with_a_token_too_few",
        "tables.py",
        "destination = self._copy(source, num_tokens, extent)",
        "destination = self._copy(source, num_tokens - 1, extent)",
        "PartialMachine",
    ),
    Mutant(
        "part_copied_with_a_token_too_many",
        "tables.py",
        "destination = self._copy(source, num_tokens, extent)",
        "destination = self._copy(source, num_tokens + 1, extent)",
        "PartialMachine",
    ),
    Mutant(
        "referenced_block_stolen",
        "tables.py",
        "if len(extent.ids) == 1 and is_free_leaf(extent, has_host=self.pool.tier is not None):",
        "if len(extent.ids) == 1 and not extent.live_children:",
        "PartialMachine",
    ),
    Mutant(
        "interior_block_stolen",
        "tables.py",
        "if len(extent.ids) == 1 and is_free_leaf(extent, has_host=self.pool.tier is not None):",
        "if len(extent.ids) == 1 and not extent.references:",
        "PartialMachine",
    ),
    Mutant(
        "stolen_block_left_in_the_index",
        "pool.py",
        "        self.acquire(extent)\n        return self.uncache(extent)\n",
        "        self.acquire(extent)\n        return extent.ids[0]\n",
        "PartialMachine",
    ),
    Mutant(
        "part_copied_before_it_is_written",
        "partial.py",
        "        self._fresh.update(extent.ids[-num_blocks:])\n",
        "",
        "PartialMachine",
    ),
    Mutant(
        "source_of_a_part_not_counted_as_needed",
        "admission.py",
        "            blocks += match.copied_blocks\n",
        "            pass\n",
        "PartialMachine",
    ),
    Mutant(
        "match_not_told_of_hits_referenced_since",
        "matching.py",
        "        while held < len(path) and path[held][0].references:\n",
        "        while held > len(path):\n",
        "ReuseMachine",
    ),
    Mutant(
        "match_not_told_of_hits_released_since",
        "matching.py",
        "        while held and not path[held - 1][0].references:\n",
        "        while held > len(path):\n",
        "ReuseMachine",
    ),
    Mutant(
        "word_on_a_block_computed_twice_in_a_window_lost",
        "windowed_tables.py",
        "                    child.retention = kept(wish)\n",
        "",
        "WindowRetentionMachine",
    ),
    Mutant(
        "hits_of_a_window_kept_as_they_were",
        "windowed_tables.py",
        "            wish = plan.at(node.start)[0]\n",
        "            wish = None\n",
        "WindowRetentionMachine",
    ),
    Mutant(
        "blocks_before_a_part_taken_for_passed",
        "admission.py",
        "(extent for extent, _ in match.path), hit_blocks * size)",
        "(extent for extent, _ in match.path), match.hit_tokens)",
        "WindowPartialMachine",
    ),
    Mutant(
        "block_not_to_be_stolen_once_the_host_forgets_what_built_on_it",
        "host.py",
        "            self.partial.changed(parent)",
        "            parent.sealed = True",
        "TierPartialMachine",
    ),
    Mutant(
        "block_stolen_that_the_host_builds_on",
        "partial.py",
        "len(extent.ids) == 1 and is_free_leaf(extent, has_host=self.has_host)",
        "len(extent.ids) == 1 and is_free_leaf(extent)",
        "TierPartialMachine",
    ),
    Mutant(
        "node_that_the_host_holds_forgotten",
        "windowed_index.py",
        "node.ids or node.host is not None or node.children",
        "node.ids or node.children",
        "WindowTierMachine",
    ),
    Mutant(
        "twins_forgotten_by_swapping_out",
        "windowed_tables.py",
        "        sequence.twins = twins\n",
        "",
        "WindowTierMachine",
    ),
    Mutant(
        "block_from_the_host_out_of_its_place",
        "admission.py",
        'array("i", [node.ids[0] for node, _ in match.path])\n',
        "table\n",
        "WindowTierMachine",
    ),
    Mutant(
        "overlap_that_is_not_the_best",
        "overlap.py",
        "                if units > most:\n",
        "                if most < 0:\n",
        "PartialMachine",
    ),
    Mutant(
        "hit_in_part_to_the_last_token",
        "partial.py",
        "(content.num_prompt_tokens - 1 - hit_blocks * tokens_per_block)",
        "(content.num_prompt_tokens - hit_blocks * tokens_per_block)",
        "PartialMachine",
    ),
    Mutant(
        "window_reaches_a_token_too_few",
        "windows.py",
        "max(window - 1, 1)",
        "max(window - 2, 1)",
        "WindowMachine",
    ),
    Mutant(
        "window_keeps_a_token_too_many",
        "windows.py",
        "max(window - 1, 1)",
        "window",
        "WindowMachine",
    ),
    Mutant(
        "sinks_that_share_a_block_with_others_leave",
        "windows.py",
        "self.sink_blocks = -(-num_sinks // tokens_per_block)",
        "self.sink_blocks = num_sinks // tokens_per_block",
        "WindowMachine",
    ),
    Mutant(
        "windowed_hit_requires_parents",
        "windowed_matching.py",
        "in_a_row >= depth - window.first_needed(depth * size)",
        "in_a_row == depth",
        "WindowMachine",
    ),
    Mutant(
        "windowed_hit_without_sinks",
        "windowed_matching.py",
        "        elif depth <= sinks:\n            break\n",
        "",
        "WindowMachine",
    ),
    Mutant(
        "node_forgotten_above_live_blocks",
        "windowed_index.py",
        "node.host is not None or node.children or node in self._ghosts",
        "node.host is not None or node in self._ghosts",
        "WindowMachine",
    ),
    Mutant(
        "node_forgotten_where_a_sequence_goes_on",
        "windowed_index.py",
        "node.children or node in self._ghosts or node in self.anchors",
        "node.children or node in self._ghosts",
        "WindowMachine",
    ),
    Mutant(
        "shared_block_counts_as_gained",
        "windowed_tables.py",
        "gained += dropped == node.references",
        "gained += 1",
        "WindowMachine",
    ),
    Mutant(
        "batch_lets_go_at_the_wrong_turn",
        "windowed_tables.py",
        "return batch.starting_in(-self.window.reach)",
        "return batch.starting_in(1 - self.window.reach)",
        "WindowMachine",
    ),
    Mutant(
        "batch_member_keeps_what_its_prefill_left",
        "batch.py",
        "        if self.windowed:\n            self.unready[sequence] = None\n",
        "",
        "WindowMachine",
    ),
    Mutant(
        "truncated_into_what_has_left",
        "windows.py",
        "self.tokens_per_block + self.reach if left",
        "self.tokens_per_block if left",
        "WindowMachine",
    ),
    Mutant(
        "host_block_reused_while_it_is_filled",
        "tiers.py",
        "            self.host.acquire_path(extent)  # before the host has it: so it never was evictable there\n"
        "            self.queue.keep(demote(self.index, extent, kept, host_ids))\n",
        "            below = demote(self.index, extent, kept, host_ids)\n"
        "            if not below.host_references:\n"
        "                self.host.available += kept\n"
        "                self.host.order[below] = None\n",
        "TierMachine",
    ),
    Mutant(
        "block_freed_while_a_transfer_uses_it",
        "blocks.py",
        "            if block in self._pins:\n",
        "            if block in ():\n",
        "TierMachine",
    ),
    Mutant(
        "onboarded_without_holding_it",
        "tiers.py",
        "            self.queue.hold(end)\n            self.host.drop_path(end)\n",
        "            self.host.drop_path(end)\n",
        "TierMachine",
    ),
    Mutant(
        "onboarding_displaced_by_what_it_evicts",
        "tiers.py",
        "            self.host.acquire_path(end)  # what is evicted now must not displace it\n",
        "            pass\n",
        "TierMachine",
    ),
    Mutant(
        "onboarded_without_a_transfer",
        "tiers.py",
        "        self.queue.back(extent.host, ids)\n\n    def recomputed",
        "\n    def recomputed",
        "TierMachine",
    ),
    Mutant(
        "swap_in_loses_the_tail",
        "tiers.py",
        "        self.queue.back(private, blocks[at:])\n",
        "",
        "TierMachine",
    ),
    Mutant(
        "swapped_out_tail_is_not_kept",
        "tiers.py",
        "        self.queue.out(private, sequence.host)\n",
        "",
        "TierMachine",
    ),
    Mutant(
        "swapped_out_blocks_free_before_they_are_read",
        "swapping.py",
        "        tier.save(sequence)\n        self.tables.vacate(sequence)\n",
        "        tier.save(sequence)\n        tier.pool._freed.extend(sequence.table[sequence.anchor.end :])\n"
        "        sequence.twins.clear()\n        self.tables.vacate(sequence)\n",
        "TierMachine",
    ),
    Mutant(
        "host_eviction_leaves_a_stale_entry",
        "prefix.py",
        "        del extent.host[keep:]\n        if keep == 0:\n            extent.host = None\n",
        "",
        "TierMachine",
    ),
    Mutant(
        "host_content_out_of_reach_is_kept",
        "tiers.py",
        "            self._forget_below(extent)\n",
        "            pass\n",
        "TierMachine",
    ),
    Mutant(
        "recomputed_content_stays_on_the_host",
        "tiers.py",
        "        else:\n            self.host.discard(extent)\n",
        "",
        "TierMachine",
    ),
    Mutant(
        "hits_on_the_host_take_no_room",
        "admission.py",
        "blocks if self.pool.tier is None else blocks + match.host_blocks",
        "blocks",
        "TierMachine",
    ),
    Mutant(
        "swapped_out_sequence_loses_what_is_cut_off_its_end",
        "tiers.py",
        "                if sequence.anchor is extent:\n                    sequence.anchor = below\n",
        "                pass\n",
        "TierMachine",
    ),
    Mutant(
        "block_taken_back_from_a_swapped_out_sequence",
        "tables.py",
        " or anchor.live_children or anchor.host_references:",
        " or anchor.live_children:",
        "TierMachine",
    ),
    Mutant(
        "offloading_not_logged",
        "tiers.py",
        "                self.events.add_blocks(OFFLOADED, NOBODY, -1, -1, extent.ids[-kept:] + host_ids)\n",
        "                pass\n",
        "TierEventsMachine",
    ),
    Mutant(
        "what_comes_back_cached_logged_as_private",
        "tiers.py",
        "self.events.add_blocks(SWAPPED_IN, sequence.number, -1, at,",
        "self.events.add_blocks(SWAPPED_IN, sequence.number, -1, 0,",
        "TierEventsMachine",
    ),
    Mutant(
        "computed_anew_logged_as_if_the_host_had_nothing",
        "tables.py",
        "        if extent.host is None:\n            events.add_blocks(STORED",
        "        if True:\n            events.add_blocks(STORED",
        "TierEventsMachine",
    ),
    Mutant(
        "transfers_let_go_unlogged",
        "transfers.py",
        "            self.events.add_block(LET_GO, NOBODY, -1, -1, extent.host[-1])\n",
        "            pass\n",
        "TierEventsMachine",
    ),
    Mutant(
        "lfu_that_never_counts",
        "eviction/lfu.py",
        "        self._hits[extent] = self._hits.get(extent, 0) + 1\n",
        "        self._hits[extent] = self._hits.get(extent, 0)\n",
        "PolicyMachine",
    ),
    Mutant(
        "free_queue_scanned_to_remove_from_it",
        "eviction/lru.py",
        "        self._order.pop(extent, None)\n\n    def evicted",
        """        for each in self._order:
            if each is extent:
                del self._order[each]
                break

    def evicted""",
        "CostMachine",
    ),
    Mutant(
        "stale_twins_free_a_live_block",
        "tables.py",
        "        sequence.twins.difference_update(positions)\n",
        "",
        "SharingMachine AllocatorMachine",
    ),
    Mutant(
        "expiry_not_told_to_the_policy",
        "pool.py",
        "            extent.retention = None\n            self.policy.expired(extent)\n",
        "            extent.retention = None\n",
        "RetentionMachine",
    ),
    Mutant(
        "hit_keeps_its_old_retention",
        "admission.py",
        "                self.tables.retain_held(sequence, plan)\n",
        "                pass\n",
        "RetentionMachine",
    ),
    Mutant(
        "retention_runs_on_into_the_next_range",
        "retaining.py",
        "            sequence.anchor.sealed = True\n",
        "            pass\n",
        "RetentionMachine",
    ),
    Mutant(
        "fork_forgets_its_wishes",
        "sharing.py",
        "            child.retention = sequence.retention\n",
        "",
        "RetentionSharingMachine",
    ),
    Mutant(
        "extent_left_open_by_a_chunk_that_fills_nothing",
        "admission.py",
        "            sequence.anchor.sealed = True\n",
        "            pass\n",
        "RetentionSharingMachine",
    ),
    Mutant(
        "twin_goes_on_in_what_is_kept_for_another",
        "tables.py",
        "                if extent.retention is not None:\n                    extent.sealed = True\n",
        "",
        "RetentionSharingMachine",
    ),
    Mutant(
        "clock_of_a_retention_not_stopped_by_a_hit",
        "pool.py",
        "                self.expiries.discard(extent)\n            self.policy.referenced(extent)\n",
        "                pass\n            self.policy.referenced(extent)\n",
        "RetentionMachine",
    ),
    Mutant(
        "what_a_window_passed_not_logged",
        "windowed_tables.py",
        "            self.events.add(PASSED, sequence.number, first, count)\n",
        "            pass\n",
        "WindowEventsMachine",
    ),
    Mutant(
        "place_logged_without_its_parent",
        "windowed_tables.py",
        "place = index.number(node), index.number(child)",
        "place = -1, index.number(child)",
        "WindowEventsMachine",
    ),
    Mutant(
        "beams_change_places_and_keep_their_slots",
        "sharing.py",
        "                sequence.batch.place(sequence)\n",
        "",
        "BatchMachine AllocatorMachine",
    ),
    Mutant(
        "walked_past_what_has_grown",
        "prefix.py",
        "            if child.grower is not None:\n                child.grower.catch_up()\n            whole",
        "            whole",
        "BatchMachine AllocatorMachine",
    ),
    Mutant(
        "repeated_beside_what_has_grown",
        "prefix.py",
        "                if child.grower is not None:\n                    child.grower.catch_up()\n"
        "                is_ghost",
        "                is_ghost",
        "BatchMachine AllocatorMachine",
    ),
]


FIELD_BUGS = {
    "a stale index entry after eviction": ["stale_entry_after_eviction"],
    "an evicted block still marked computed": ["evicted_block_still_counts_as_computed"],
    "a hit block reset on touch": ["hit_block_reset_on_touch"],
    "its child registered under an empty parent": ["child_registered_under_the_root"],
    "a zero-length query on a full-prompt hit": ["nothing_left_to_compute_on_a_full_hit"],
    "duplicate blocks freed while a table points at them": ["duplicate_freed_under_its_table"],
    "shared blocks counted twice as evictable": ["shared_blocks_counted_as_evictable"],
    "block-size-1 arithmetic used at other sizes": ["tokens_of_a_hit_as_if_blocks_had_one"],
    "a stale mapping that frees a live slot": ["stale_twins_free_a_live_block", "fork_frees_a_live_block"],
    "unhashed partial blocks entering the eviction order": ["partial_block_becomes_evictable"],
    "an LFU whose counter never moves": ["lfu_that_never_counts"],
    "a double free on abort": ["double_free_on_abort"],
    "an O(n) removal from the free queue": ["free_queue_scanned_to_remove_from_it"],
}
"""Bugs that serving systems had, and the mutants that plant them."""


EVERY_RUN = {
    "copy_on_write_skipped",
    "hit_block_freed_by_taking_first",
    "slot_off_by_one",
    "registered_under_the_wrong_parent",
}
"""The four that any change to the manager is most likely to bring back."""


def test_every_bug_known_from_the_field_is_planted() -> None:
    planted = {mutant.name for mutant in MUTANTS}
    assert planted >= EVERY_RUN
    assert all(planted.issuperset(names) for names in FIELD_BUGS.values())


def test_every_mutant_follows_the_code() -> None:
    """Also those that are slow, and so not run every time."""
    package = Path(allocator.__file__).parent
    texts = {file: (package / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    stale = {m.name: texts[m.file].count(m.old) for m in MUTANTS if texts[m.file].count(m.old) != 1}
    assert not stale, "the texts that these change do not occur once"


Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run the machines of the package in a folder: the arguments are that folder and the runner's."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, RUNNER],
        env=environment | {"PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdin is not None
        assert server.stdout is not None

        def ask(folder: Path, *arguments: str) -> str:
            print(json.dumps([str(folder), *arguments]), file=server.stdin, flush=True)
            status = server.stdout.readline().strip()
            said = (folder / "said").read_text()
            assert status == "0", said
            return said.strip()

        yield ask


def _copy(folder: Path) -> Path:
    source = Path(allocator.__file__).parent
    return Path(shutil.copytree(source, folder / "allocator", ignore=shutil.ignore_patterns("__pycache__")))


def _cases() -> list[object]:
    """Return all mutants; those that are neither a bug known from the field nor of EVERY_RUN, some minutes in all, are slow."""
    always = {name for names in FIELD_BUGS.values() for name in names} | EVERY_RUN
    return [
        pytest.param(mutant, id=mutant.name, marks=() if mutant.name in always else pytest.mark.slow)
        for mutant in MUTANTS
    ]


@pytest.mark.parametrize("mutant", _cases())
def test_a_planted_bug_is_found(
    mutant: Mutant, tmp_path: Path, run: Run, record_property: Callable[[str, object], None]
) -> None:
    path = _copy(tmp_path) / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, (
        f"the text that {mutant.name} changes occurs {text.count(mutant.old)} times"
    )
    path.write_text(text.replace(mutant.old, mutant.new))
    outcome = run(tmp_path, str(STEPS), *mutant.machines.split())
    record_property("planted bug", f"{mutant.name}: {outcome}")  # conftest prints it in the summary
    assert outcome.startswith("killed by"), f"{mutant.name} {outcome}"


def test_the_package_itself_survives(tmp_path: Path, run: Run) -> None:
    _copy(tmp_path)
    assert run(tmp_path, "300", "AllocatorMachine") == "survived"
