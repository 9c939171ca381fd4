// The rendezvous of a warp's lanes in shuffles, votes, matches, reductions and __syncwarp.
#include "schedule.h"

namespace cuda_host {

[[noreturn]] static void bad_mask(const Lane& me, unsigned mask, const char* name, Site site) {
    if (!(mask >> me.index & 1u))
        fail(me, site, "%s: mask 0x%08x does not name the calling lane %u", name, mask, me.index);
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(mask & ~me.warp->alive));
    const Lane& other = me.warp->lanes[lane];
    if (&other >= running()->worker->lanes + running()->count)
        fail(me, site, "%s: mask 0x%08x names lane %u, but the block's last warp has only %u lanes", name, mask, lane,
             (running()->count - 1) % 32 + 1);
    fail(me, site, "%s: mask 0x%08x names lane %u, but %s", name, mask, lane, describe(other).text);
}

static void complete(Warp& warp, Op op, unsigned mask, const char* name, Site site) {
    unsigned bits = 0;
    switch (op) {
        case Op::Shuffle:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                const unsigned source = warp.source[lane];
                if (__builtin_expect(!(mask >> source & 1u), 0))
                    fail(warp.lanes[lane], warp.lanes[lane].site, "%s: lane %u reads lane %u, which mask 0x%08x does not name",
                         name, lane, source, mask);
                warp.result[lane] = warp.value[source];
            }
            return;
        case Op::SyncWarp:
            return;
        case Op::Ballot:
        case Op::Any:
        case Op::All:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                bits |= static_cast<unsigned>(warp.value[lane]) << lane;
            }
            if (op == Op::Any) bits = bits != 0;
            if (op == Op::All) bits = bits == mask;
            for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = bits;
            return;
        case Op::MatchAny:
            for (unsigned rest = mask; rest; rest &= rest - 1) {
                const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
                uint64_t same = 0;
                for (unsigned others = mask; others; others &= others - 1) {
                    const unsigned other = static_cast<unsigned>(__builtin_ctz(others));
                    if (warp.value[other] == warp.value[lane]) same |= 1ull << other;
                }
                warp.result[lane] = same;
            }
            return;
        case Op::MatchAll:
            bits = mask;
            for (unsigned rest = mask; rest; rest &= rest - 1)
                if (warp.value[__builtin_ctz(rest)] != warp.value[__builtin_ctz(mask)]) bits = 0;
            for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = bits;
            return;
        default:
            break;
    }
    uint32_t total = static_cast<uint32_t>(warp.value[__builtin_ctz(mask)]);
    for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) {
        const uint32_t value = static_cast<uint32_t>(warp.value[__builtin_ctz(rest)]);
        const int32_t a = static_cast<int32_t>(total), b = static_cast<int32_t>(value);
        if (op == Op::ReduceAdd) total += value;
        if (op == Op::ReduceMin) total = a < b ? total : value;
        if (op == Op::ReduceMax) total = a > b ? total : value;
        if (op == Op::ReduceMinUnsigned) total = total < value ? total : value;
        if (op == Op::ReduceMaxUnsigned) total = total > value ? total : value;
        if (op == Op::ReduceAnd) total &= value;
        if (op == Op::ReduceOr) total |= value;
        if (op == Op::ReduceXor) total ^= value;
    }
    (void)site;
    for (unsigned rest = mask; rest; rest &= rest - 1) warp.result[__builtin_ctz(rest)] = total;
}

// Return the lanes of `candidates`, which wait, that wait for what `me` now asks. The others of them may still be busy
// with operations that `me` has no part in; one that waits for `me` in another operation waits for ever.
static unsigned lanes_met(const Lane& me, unsigned candidates) {
    unsigned met = 0;
    for (unsigned rest = candidates; rest; rest &= rest - 1) {
        const Lane& other = me.warp->lanes[__builtin_ctz(rest)];
        if (other.mask == me.mask && other.op == me.op)
            met |= rest & -rest;
        else if (other.mask >> me.index & 1u)
            fail(me, me.site, "%s (mask 0x%08x) meets another operation: %s", me.name, me.mask, describe(other).text);
    }
    return met;
}

uint64_t warp_op(Op op, unsigned mask, uint64_t value, int source, const char* name, Site site) {
    Lane* const me = current;
    Warp& warp = *me->warp;
    RunningBlock& block = *running();
    const unsigned bit = 1u << me->index;
    me->name = name;
    me->site = site;
    me->mask = mask;
    me->op = op;
    if (__builtin_expect(!(mask & bit) || (mask & ~warp.alive), 0)) bad_mask(*me, mask, name, site);
    warp.value[me->index] = value;
    warp.source[me->index] = static_cast<unsigned char>(source);
    unsigned met = warp.waiting & mask;
    if (warp.waiting == 0) {
        warp.uniform = true;
        warp.first_waiting = me;
    } else if (!warp.uniform || warp.first_waiting->mask != mask || warp.first_waiting->op != op) {
        warp.uniform = false;
        met = lanes_met(*me, met);
    }
    if ((met | bit) != mask) {
        warp.waiting |= bit;
        me->state = State::AtWarpOp;
        wait(block, me);
        return warp.result[me->index];
    }
    complete(warp, op, mask, name, site);
    warp.waiting &= ~mask;
    for (unsigned rest = met; rest; rest &= rest - 1) warp.lanes[__builtin_ctz(rest)].state = State::Ready;
    make_ready(block, &warp, met);
    block.worker->progress++;
    me->spins = 0;
    return warp.result[me->index];
}

unsigned active_mask(Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = "__activemask";
    me->site = site;
    me->state = State::AtActiveMask;
    me->warp->active |= 1u << me->index;
    wait(block, me);
    return static_cast<unsigned>(me->warp->result[me->index]);
}

}  // namespace cuda_host
