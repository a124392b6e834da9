#include <cstdint>
#include <type_traits>

#include "device/opening.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "host/cuda_launch.h"
#include "kernels/combine_sums.cuh"
#include "kernels/exchange.h"
#include "layout/plan.h"

// Senders sum each received token's layout rows on this rank and store the sum into the ring of the token's source;
// reducers walk this rank's own tokens and add the sums of all ranks, in rank order, as their groups arrive. Rows of
// this rank's own tokens skip the ring. Senders that have nothing left to send reduce as well. The order of every sum
// is fixed, so that two runs give the same bits.
namespace moe_ep {
namespace {

using namespace combine;

constexpr int kPartTokens = 2;
// Above, more warps with smaller stages are faster.
constexpr int64_t kManyChunks = 2048 / kChunkTokens;
// Sums of several rows gain more from finer work than each unit costs.
constexpr int kWantedUnits = 128, kWantedUnitsOfChoices = 512;

// Shared memory of one warp.
template <class T, class Summer>
struct WarpShared {
    std::byte* stages;
    Batch<T>* batch;

    __device__ WarpShared(void* base, int warp)
        : stages(static_cast<std::byte*>(base) + warp * num_bytes()),
          batch(reinterpret_cast<Batch<T>*>(stages + Summer::shared_bytes())) {}
    MOE_EP_HOST_DEVICE static constexpr int64_t num_bytes() {
        constexpr int64_t kAlignment = 128;
        return (Summer::shared_bytes() + static_cast<int64_t>(sizeof(Batch<T>)) + kAlignment - 1) / kAlignment *
               kAlignment;
    }
};

// A group whose stores are under way while the next one is summed: its flag follows once they are complete. `kStores`:
// of the next group that are issued before this one's are waited for.
template <int kStores>
struct PendingFlag {
    int peer = -1, num_stores = 0;
    int64_t slot = 0, lap = 0;

    // Called after each store of the next group.
    __device__ bool is_due() { return peer >= 0 && ++num_stores == kStores; }
    __device__ void raise(const Link& link, uint64_t epoch) {
        device::flag_group(link, epoch, peer, slot, lap);
        peer = -1;
        num_stores = 0;
    }
};

// Sums the rows of the groups that go to peers, and stores them there. Returns false when the exchange has failed.
template <class T, class Summer>
__device__ bool send_sums(const CombineParams& params, uint64_t epoch, const Cut& cut, Batch<T>& batch, Summer& summer,
                          Worker worker) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const PlanTable table(params.rows.table, link.num_ranks, params.rows.num_experts);
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims);
    const int lane = threadIdx.x % kWarpSize, num_peers = link.num_ranks - 1;
    constexpr int kStores = Summer::kPendingStores;
    PendingFlag<kStores> pending;
    const auto flush = [&] {
        summer.drain();
        if (lane == 0 && pending.peer >= 0) pending.raise(link, epoch);
    };
    const auto stored = [&] {
        if (pending.is_due()) {
            Summer::template wait_older<kStores>();
            pending.raise(link, epoch);
        }
    };
    BatchFiller<T> filler(params, batch, cut);
    const int units = cut.units();
    const int64_t num_items = device::most_chunks(params.rows, table, link.num_ranks) * units * num_peers;
    for (int64_t item = worker.first; item < num_items; item += worker.stride) {
        const int peer = static_cast<int>((link.rank + 1 + item % num_peers) % link.num_ranks);
        const int unit = static_cast<int>(item / num_peers % units);
        const int64_t chunk = item / num_peers / units, slot = chunk % ring_groups, lap = chunk / ring_groups;
        if (chunk >= num_chunks(table.source_tokens[peer])) continue;
        if (lap > 0) {
            const uint64_t* flag = device::consumed_flag(link, peer, link.rank, slot);
            const uint64_t stamp = device::group_stamp(epoch, lap - 1);
            int good = lane != 0 || ptx::load_acquire_sys(flag) >= stamp;
            if (__shfl_sync(kAllLanes, good, 0) == 0) {
                // NOTE: a peer may wait for the flag that is still pending before it makes room.
                flush();
                good = lane != 0 || device::wait_for(link, flag, stamp, peer, Phase::kRoom);
                if (__shfl_sync(kAllLanes, good, 0) == 0) return false;
            }
        }
        // A place that a peer has freed is written by the copy engine.
        Summer::fence_arena();
        const int32_t* told = params.rows.groups + (peer * params.rows.max_chunks + chunk) * 2;
        const auto mask = static_cast<uint32_t>(told[1]);
        const GroupLayout group =
            device::group_at(link, dims, peer, link.rank, device::sent_slot(link, slot, ring_groups));
        if (lane == 0 && device::has_fault(link, Fault::kEarlyFlag)) {
            device::flag_group(link, epoch, peer, slot * units + unit, lap);
            device::delay_fault();
        }
        filler.set_slice(cut.slice(unit));
        const uint32_t sent = mask & cut.tokens(unit);
        for (uint32_t left = device::has_fault(link, Fault::kSkippedRow) ? sent & (sent - 1) : sent; left != 0;
             left &= left - 1) {
            const int idx = __ffs(left) - 1;
            const int64_t received = told[0] + __popc(mask & ((1u << idx) - 1));
            filler.begin_token(group.rows.row(idx), params.wide_wire != 0);
            filler.add_choices(received);
            for (int word = lane; cut.slice(unit) == 0 && word < params.rows.top_k * params.value_words;
                 word += kWarpSize) {
                group.meta.row(idx)[word] =
                    load_value(params, received, word / params.value_words, word % params.value_words);
            }
            if ((left & (left - 1)) != 0 && !filler.is_full()) continue;
            filler.finish();
            summer.run(batch, filler.num_tokens(), params.wide_wire != 0, stored);
            filler.clear();
        }
        __syncwarp();
        if (lane == 0) {
            // Groups of few rows may not have been enough to raise the flag before.
            if (pending.peer >= 0) {
                Summer::template wait_older<0>();
                pending.raise(link, epoch);
            }
            pending.peer = peer;
            pending.slot = slot * units + unit;
            pending.lap = lap;
        }
    }
    flush();
    return true;
}

// Adds up, for each of this rank's tokens, what all ranks have summed.
template <class T, class Summer>
__device__ void reduce_tokens(const CombineParams& params, uint64_t epoch, const Cut& cut, Batch<T>& batch,
                              Summer& summer) {
    const Link& link = params.link;
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t ring_groups = num_ring_groups(link.payload_bytes, dims), total = num_chunks(params.rows.num_tokens);
    const int lane = threadIdx.x % kWarpSize;
    // Work is cut finer than groups where no later lap needs their places, and the end is reached by all at once.
    const int parts = total <= ring_groups && cut.parts == 1 ? kChunkTokens / kPartTokens : cut.parts;
    const int part_tokens = kChunkTokens / parts, units = parts * cut.slices;
    BatchFiller<T> filler(params, batch, cut);
    device::Tickets tickets(link, epoch);
    for (int64_t item = tickets.take(); item < total * units; item = tickets.take()) {
        const int64_t chunk = item / units, slot = chunk % ring_groups, lap = chunk / ring_groups;
        const int part = static_cast<int>(item % units) / cut.slices, slice = static_cast<int>(item % cut.slices);
        // A slice of a group that is not cut into parts is flagged once, whatever parts it is reduced in.
        const int64_t flag = slot * cut.units() + (cut.parts == 1 ? 0 : part * cut.slices) + slice;
        if (!wait_for_groups(link, epoch, flag, lap)) return;
        // Rows that were acquired through flags are read by the copy engine.
        Summer::fence_arena();
        const int32_t* told = params.rows.groups + (link.rank * params.rows.max_chunks + chunk) * 2;
        const auto own_mask = static_cast<uint32_t>(told[1]);
        const int first = part * part_tokens;
        filler.set_slice(slice);
        const auto last = static_cast<int>(
            min(static_cast<int64_t>(first + part_tokens), params.rows.num_tokens - chunk * kChunkTokens));
        for (int idx = first; idx < last; ++idx) {
            const int64_t token = chunk * kChunkTokens + idx;
            const int64_t offset = token * params.hidden * static_cast<int64_t>(sizeof(T));
            const uint32_t ranks = params.rows.token_ranks[token];
            const int64_t received = told[0] + __popc(own_mask & ((1u << idx) - 1));
            filler.begin_token(params.out + offset, false);
            for (uint32_t left = ranks; left != 0; left &= left - 1) {
                const int rank = __ffs(left) - 1;
                if (rank == link.rank) {
                    filler.add_choices(received);
                } else {
                    filler.add_row(device::group_at(link, dims, link.rank, rank, slot).rows.row(idx),
                                   params.wide_wire != 0);
                }
            }
            for (const std::byte* bias : params.bias) {
                if (bias != nullptr) filler.add_row(bias + offset, false);
            }
            if (params.out_values != nullptr && slice == 0) add_values(params, dims, token, idx, ranks, received, slot);
            if (idx + 1 < last && !filler.is_full()) continue;
            filler.finish();
            summer.run(batch, filler.num_tokens(), false);
            filler.clear();
        }
        if (lane < link.num_ranks && lane != link.rank) {
            device::release_group(link, epoch, lane, chunk, total, ring_groups);
        }
    }
}

// Makes outputs NaN after an overflow: all bits set is one in every format.
template <class T>
__device__ void poison_tokens(const CombineParams& params, Worker worker) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_vectors = params.hidden * static_cast<int64_t>(sizeof(T)) / device::kVectorBytes;
    const int64_t num_words = static_cast<int64_t>(params.rows.top_k) * params.value_words;
    for (int64_t token = worker.first; token < params.rows.num_tokens; token += worker.stride) {
        auto* row = reinterpret_cast<uint4*>(params.out) + token * num_vectors;
        for (int64_t at = lane; at < num_vectors; at += kWarpSize) row[at] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (params.out_values == nullptr) continue;
        for (int64_t word = lane; word < num_words; word += kWarpSize) params.out_values[token * num_words + word] = -1;
    }
}

template <class T, bool kBulk, bool kMany>
__global__ void __launch_bounds__(SummerOf<T, kBulk, kMany>::kWarps* kWarpSize)
    combine_rows(const __grid_constant__ CombineParams params) {
    using Summer = SummerOf<T, kBulk, kMany>;
    if constexpr (kBulk != Summer::kBulk) return;
    extern __shared__ uint4 memory[];
    uint64_t epoch;
    if (device::has_failed(params.link) || !device::join_exchange(params.link, params.opening, epoch)) return;
    constexpr int kWarps = Summer::kWarps;
    const int warp = threadIdx.x / kWarpSize, block = static_cast<int>(blockIdx.x);
    const bool sends = block < params.num_senders;
    const int role_block = sends ? block : block - params.num_senders;
    const int role_blocks = sends ? params.num_senders : params.num_reducers;
    // Neighbouring chunks go to different SMs.
    const Worker worker{role_block + static_cast<int64_t>(warp) * role_blocks,
                        static_cast<int64_t>(role_blocks) * kWarps};
    const PlanTable table(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    if (*table.overflow != 0) {
        if (!sends) poison_tokens<T>(params, worker);
        return;
    }
    WarpShared<T, Summer> shared(memory, warp);
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const Cut cut(device::most_chunks(params.rows, table, params.link.num_ranks),
                  num_ring_groups(params.link.payload_bytes, dims), params.hidden / device::ElementsOf<T>::kCount,
                  params.layout == Layout::kCompact ? kWantedUnits : kWantedUnitsOfChoices);
    Summer summer(shared.stages, params, cut);
    if (!sends || send_sums<T>(params, epoch, cut, *shared.batch, summer, worker)) {
        reduce_tokens<T>(params, epoch, cut, *shared.batch, summer);
    }
    // Stores read shared memory, which must outlive them.
    summer.drain();
}

template <class T, bool kBulk, bool kMany>
constexpr int64_t kBlockBytes =
    WarpShared<T, SummerOf<T, kBulk, kMany>>::num_bytes() * SummerOf<T, kBulk, kMany>::kWarps;

template <class T, bool kBulk, bool kMany>
void launch(const CombineParams& params, void* started, cudaStream_t stream) {
    const int num_blocks = params.num_senders + params.num_reducers;
    constexpr int kThreads = SummerOf<T, kBulk, kMany>::kWarps * kWarpSize;
    launch_telling_start("combine_rows", combine_rows<T, kBulk, kMany>, num_blocks, kThreads,
                         kBlockBytes<T, kBulk, kMany>, started, stream, params);
}

// Loads a kernel and allows it its shared memory.
template <class T, bool kBulk, bool kMany>
void prepare() {
    check_cuda(cudaFuncSetAttribute(combine_rows<T, kBulk, kMany>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(kBlockBytes<T, kBulk, kMany>)),
               "cudaFuncSetAttribute(combine_rows)");
}

template <class Visit>
void dispatch_element(Element element, Visit&& visit) {
    switch (element) {
        case Element::kBf16:
            return visit(__nv_bfloat16{});
        case Element::kHalf:
            return visit(__half{});
        case Element::kFloat:
            return visit(float{});
        case Element::kDouble:
            return visit(double{});
    }
}

// Not in laps, where senders wait for room as soon as more warps send.
bool has_many_rows(const CombineParams& params) {
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t num_groups = params.rows.max_chunks;
    const bool in_laps = params.link.num_ranks > 1 && num_groups > num_ring_groups(params.link.payload_bytes, dims);
    return num_groups > kManyChunks && !in_laps;
}

}  // namespace

void prepare_combine(bool bulk) {
    for (const Element element : {Element::kBf16, Element::kHalf, Element::kFloat, Element::kDouble}) {
        dispatch_element(element, [&](auto value) {
            using T = decltype(value);
            if (bulk) {
                prepare<T, true, false>();
                prepare<T, true, true>();
            }
            prepare<T, false, false>();
        });
    }
}

void launch_combine(const CombineParams& params, bool bulk, void* started, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_element(params.element, [&](auto value) {
        using T = decltype(value);
        if (!bulk) return launch<T, false, false>(params, started, on);
        return has_many_rows(params) ? launch<T, true, true>(params, started, on)
                                     : launch<T, true, false>(params, started, on);
    });
}

}  // namespace moe_ep
