// The barriers of a block.
#include "schedule.h"

namespace cuda_host {

static void release_everyone(RunningBlock& block, const Lane* but) {
    for (unsigned i = 0; i < block.count; i++) block.worker->lanes[i].state = State::Ready;
    for (unsigned w = 0; w < block.num_warps; w++) make_ready(block, &block.worker->warps[w], block.worker->warps[w].alive);
    Warp* warp = but->warp;
    warp->ready &= ~(1u << but->index);
    if (!warp->ready) block.ready_warps &= ~(1u << (warp - block.worker->warps));
}

static const Lane& first_exited(const RunningBlock& block) {
    const Lane* lane = block.worker->lanes;
    while (lane->state != State::Exited) lane++;
    return *lane;
}

int barrier(Barrier kind, int predicate, const char* name, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = name;
    me->site = site;
    me->barrier = 0;
    me->state = State::AtBarrier;
    if (__builtin_expect(block.exited != 0, 0))
        fail(*me, site, "%s is not reached by every thread: %s", name, describe(first_exited(block)).text);
    if (block.arrived == 0) {
        block.first_arrived = me;
        block.barrier_kind = kind;
        block.barrier_value = kind == Barrier::And;
    } else if (__builtin_expect(block.first_arrived->site.line != site.line || block.barrier_kind != kind, 0)) {
        fail(*me, site, "%s is not reached by every thread: %s", name, describe(*block.first_arrived).text);
    }
    if (kind == Barrier::Count) block.barrier_value += predicate != 0;
    if (kind == Barrier::And) block.barrier_value &= predicate != 0;
    if (kind == Barrier::Or) block.barrier_value |= predicate != 0;
    if (++block.arrived < block.count) {
        wait(block, me);
        return block.barrier_result;
    }
    block.arrived = 0;
    block.barrier_result = block.barrier_value;
    release_everyone(block, me);
    block.worker->progress++;
    me->spins = 0;
    return block.barrier_result;
}

void named_barrier(int id, int count, Site site) {
    Lane* const me = current;
    RunningBlock& block = *running();
    me->name = "named barrier";
    me->site = site;
    me->barrier = id;
    if (id < 1 || id >= NAMED_BARRIERS)
        fail(*me, site, "named barrier (%d) must be from 1 to %d", id, NAMED_BARRIERS - 1);
    if (count < 32 || count % 32 != 0 || static_cast<unsigned>(count) > (block.count + 31) / 32 * 32)
        fail(*me, site, "named barrier %d: count (%d) must be a multiple of 32 within the block", id, count);
    NamedBarrier& meeting = block.named[id];
    if (meeting.arrived == 0) meeting.expected = count;
    if (meeting.expected != count)
        fail(*me, site, "named barrier %d: count (%d) differs from that of the threads that wait (%d)", id, count,
             meeting.expected);
    if (++meeting.arrived < count) {
        me->state = State::AtNamedBarrier;
        wait(block, me);
        return;
    }
    meeting.arrived = 0;
    for (unsigned i = 0; i < block.count; i++) {
        Lane& lane = block.worker->lanes[i];
        if (lane.state != State::AtNamedBarrier || lane.barrier != id) continue;
        lane.state = State::Ready;
        make_ready(block, lane.warp, 1u << lane.index);
    }
    block.worker->progress++;
}

}  // namespace cuda_host
