// Which lane runs next, and the switch to it.
//
// Lanes that can run are bits in their warp's `ready` mask, warps with such lanes are bits in `ready_warps`. A lane
// runs until it must wait, then switches straight to the next ready lane, of its own warp if there is one. Whoever
// arrives last at a rendezvous computes the result for all, marks them ready and goes on. When no lane is ready and
// not all have exited, the block has deadlocked.
#pragma once

#ifdef CUDA_HOST_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif

#include "failures.h"

namespace cuda_host {

static inline unsigned next_random(RunningBlock& block) {
    // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled".
    uint64_t x = block.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    block.random = x;
    return static_cast<unsigned>(x * 0x2545f4914f6cdd1dull >> 32);
}

static inline unsigned first_bit_from(unsigned bits, unsigned start) {
    const unsigned rotated = bits >> (start & 31u) | bits << (-start & 31u);
    return (static_cast<unsigned>(__builtin_ctz(rotated)) + start) & 31u;
}

static inline void make_ready(RunningBlock& block, Warp* warp, unsigned lanes) {
    if (!lanes) return;
    warp->ready |= lanes;
    block.ready_warps |= 1u << (warp - block.worker->warps);
}

static bool wake_spinning(RunningBlock& block) {
    for (unsigned rest = block.spinning_warps; rest; rest &= rest - 1) {
        Warp& warp = block.worker->warps[__builtin_ctz(rest)];
        make_ready(block, &warp, warp.spinning);
        warp.spinning = 0;
    }
    block.spinning_warps = 0;
    return block.ready_warps != 0;
}

// Take the next lane to run, or null: of the warp `prefer`, from the lane behind `lane` on, if it has one ready. Lanes
// that spin run again only when no other can, for what they wait for is another's to do.
static inline Lane* pick(RunningBlock& block, Warp* prefer, unsigned lane) {
    Warp* warps = block.worker->warps;
    Warp* warp = prefer;
    unsigned start = lane + 1;
    bool stay = warp && warp->ready;
    if (block.random) {
        const unsigned random = next_random(block);
        start = random;
        stay = stay && (random >> 5 & 3u) != 0;  // now and then, another warp goes first
    }
    if (!stay) {
        if (!block.ready_warps && !wake_spinning(block)) return nullptr;
        const unsigned from = block.random ? next_random(block) : prefer ? static_cast<unsigned>(prefer - warps) : 0;
        warp = warps + first_bit_from(block.ready_warps, from);
        if (!block.random && warp != prefer) start = 0;
    }
    const unsigned chosen = first_bit_from(warp->ready, start);
    warp->ready &= ~(1u << chosen);
    if (!warp->ready) block.ready_warps &= ~(1u << (warp - warps));
    return warp->lanes + chosen;
}

static inline void switch_lanes(Lane* from, Lane* to) {
    current = to;
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_start_switch_fiber(from->state == State::Exited ? nullptr : &from->fake_stack, to->stack_low,
                                   to->stack_bytes);
#endif
    cuda_host_switch(&from->stack_pointer, to->stack_pointer);
#ifdef CUDA_HOST_ADDRESS
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Let the lanes parked in __activemask go whose warp has nothing else to run: they have converged.
static bool release_active(RunningBlock& block) {
    bool released = false;
    for (unsigned w = 0; w < block.num_warps; w++) {
        Warp& warp = block.worker->warps[w];
        if (warp.ready || !warp.active) continue;
        const Site site = warp.lanes[__builtin_ctz(warp.active)].site;
        unsigned together = 0;
        for (unsigned rest = warp.active; rest; rest &= rest - 1) {
            const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
            if (warp.lanes[lane].site.line == site.line) together |= 1u << lane;
        }
        for (unsigned rest = together; rest; rest &= rest - 1) {
            const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
            warp.result[lane] = together;
            warp.lanes[lane].state = State::Ready;
        }
        warp.active &= ~together;
        make_ready(block, &warp, together);
        released = true;
    }
    return released;
}

[[noreturn]] static void report_deadlock(RunningBlock& block) {
    // Name a lane that waits in a warp operation and one it waits for, else one at a barrier and one elsewhere.
    Lane* lanes = block.worker->lanes;
    const Lane* waiter = nullptr;
    const Lane* missing = nullptr;
    for (unsigned i = 0; i < block.count && !missing; i++) {
        Lane& lane = lanes[i];
        if (lane.state == State::AtWarpOp) {
            const unsigned absent = lane.mask & ~lane.warp->waiting;
            if (absent) waiter = &lane, missing = lane.warp->lanes + __builtin_ctz(absent);
        }
    }
    for (unsigned i = 0; i < block.count && !missing; i++)
        if (lanes[i].state == State::AtBarrier || lanes[i].state == State::AtNamedBarrier) {
            waiter = &lanes[i];
            for (unsigned j = 0; j < block.count; j++)
                if (lanes[j].state != lanes[i].state || lanes[j].barrier != lanes[i].barrier) missing = &lanes[j];
            if (!missing) break;
        }
    if (!waiter) waiter = lanes;
    const Text other = missing ? describe(*missing) : Text{"no thread is left to arrive"};
    fail(*waiter, waiter->site, "%s can never complete: %s", waiter->name ? waiter->name : "the block", other.text);
}

// Run others until something makes `me` ready again.
static inline void wait(RunningBlock& block, Lane* me) {
    me->spins = 0;
    block.worker->switches++;
    Lane* next = pick(block, me->warp, me->index);
    if (__builtin_expect(!next, 0)) {
        if (release_active(block)) next = pick(block, me->warp, me->index);
        if (!next) report_deadlock(block);
    }
    if (next != me) switch_lanes(me, next);
}

// Let all the others run first.
static inline void give_way(RunningBlock& block, Lane* me) {
    me->warp->spinning |= 1u << me->index;
    block.spinning_warps |= 1u << (me->warp - block.worker->warps);
    wait(block, me);
}

}  // namespace cuda_host
