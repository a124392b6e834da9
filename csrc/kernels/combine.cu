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
// Places in the rings that are freed one by one: larger ones keep peers waiting, smaller ones cost a wait each.
constexpr int kWantedUnitsInLaps = 1024;

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

// Adds up, for each of this rank's tokens, what all ranks have summed, piece by piece: a group's tokens, or a part or
// slice of them. All members are called by a whole warp.
template <class T, class Summer>
class Reducer {
public:
    __device__ Reducer(const CombineParams& params, uint64_t epoch, const Cut& cut, Batch<T>& batch, Summer& summer)
        : params_(params),
          link_(params.link),
          epoch_(epoch),
          cut_(cut),
          dims_{params.rows.row_bytes, params.rows.meta_words},
          ring_groups_(num_ring_groups(params.link.payload_bytes, dims_)),
          total_(num_chunks(params.rows.num_tokens)),
          // Work is cut finer than groups where no later lap needs their places, and the end is reached by all at once.
          parts_(total_ <= ring_groups_ && cut.parts == 1 ? kChunkTokens / kPartTokens : cut.parts),
          batch_(batch),
          summer_(summer),
          filler_(params, batch, cut),
          tickets_(params.link, epoch) {}

    // Reduces until nothing is left.
    __device__ void run() {
        tickets_.ask();
        for (int64_t piece = tickets_.get(); piece < num_pieces(); piece = tickets_.get()) {
            // The next one is on its way meanwhile.
            tickets_.ask();
            if (!wait(piece)) return;
            reduce(piece);
        }
    }

    // The same in laps, where a piece that a busy warp holds keeps peers waiting.
    __device__ void run_in_laps() {
        for (;; holds_ = false) {
            hold();
            const int64_t piece = tickets_.get();
            if (piece >= num_pieces() || !wait(piece)) return;
            reduce(piece);
        }
    }

    // Whether this warp has taken a piece that it has yet to reduce.
    __device__ bool holds() const { return holds_; }

    // Reduces the piece that this warp holds, or else the next one, if it has come. Returns whether it did.
    __device__ bool help() {
        hold();
        const int64_t piece = tickets_.get();
        if (piece >= num_pieces() || !have_groups(link_, epoch_, flag(piece), lap(piece))) return false;
        reduce(piece);
        holds_ = false;
        return true;
    }

private:
    __device__ void hold() {
        if (holds_) return;
        tickets_.ask();
        holds_ = true;
    }

    __device__ int units() const { return parts_ * cut_.slices; }
    __device__ int64_t num_pieces() const { return total_ * units(); }
    __device__ int64_t slot(int64_t piece) const { return piece / units() % ring_groups_; }
    __device__ int64_t lap(int64_t piece) const { return piece / units() / ring_groups_; }
    __device__ int part(int64_t piece) const { return static_cast<int>(piece % units()) / cut_.slices; }
    __device__ int slice(int64_t piece) const { return static_cast<int>(piece % cut_.slices); }
    // A slice of a group that is not cut into parts is flagged once, whatever parts it is reduced in.
    __device__ int64_t flag(int64_t piece) const {
        return slot(piece) * cut_.units() + (cut_.parts == 1 ? 0 : part(piece) * cut_.slices) + slice(piece);
    }
    __device__ bool wait(int64_t piece) const { return wait_for_groups(link_, epoch_, flag(piece), lap(piece)); }

    __device__ void reduce(int64_t piece) {
        const CombineParams& params = params_;
        const int64_t chunk = piece / units(), slot = chunk % ring_groups_;
        const int part_tokens = kChunkTokens / parts_, slice = this->slice(piece);
        // Rows that were acquired through flags are read by the copy engine.
        Summer::fence_arena();
        const int32_t* told = params.rows.groups + (link_.rank * params.rows.max_chunks + chunk) * 2;
        const auto own_mask = static_cast<uint32_t>(told[1]);
        const int first = part(piece) * part_tokens;
        filler_.set_slice(slice);
        const auto last = static_cast<int>(
            min(static_cast<int64_t>(first + part_tokens), params.rows.num_tokens - chunk * kChunkTokens));
        for (int idx = first; idx < last; ++idx) {
            const int64_t token = chunk * kChunkTokens + idx;
            const int64_t offset = token * params.hidden * static_cast<int64_t>(sizeof(T));
            const uint32_t ranks = params.rows.token_ranks[token];
            const int64_t received = told[0] + __popc(own_mask & ((1u << idx) - 1));
            filler_.begin_token(params.out + offset, false);
            for (uint32_t left = ranks; left != 0; left &= left - 1) {
                const int rank = __ffs(left) - 1;
                if (rank == link_.rank) {
                    filler_.add_choices(received);
                } else {
                    filler_.add_row(device::group_at(link_, dims_, link_.rank, rank, slot).rows.row(idx),
                                    params.wide_wire != 0);
                }
            }
            for (const std::byte* bias : params.bias) {
                if (bias != nullptr) filler_.add_row(bias + offset, false);
            }
            if (params.out_values != nullptr && slice == 0) {
                add_values(params, dims_, token, idx, ranks, received, slot);
            }
            if (idx + 1 < last && !filler_.is_full()) continue;
            filler_.finish();
            summer_.run(batch_, filler_.num_tokens(), false);
            filler_.clear();
        }
        const int lane = threadIdx.x % kWarpSize;
        if (lane < link_.num_ranks && lane != link_.rank) {
            device::release_group(link_, epoch_, lane, chunk, total_, ring_groups_, static_cast<int>(piece % units()),
                                  units());
        }
    }

    const CombineParams& params_;
    const Link& link_;
    const uint64_t epoch_;
    const Cut& cut_;
    const RecordDims dims_;
    const int64_t ring_groups_, total_;
    const int parts_;
    Batch<T>& batch_;
    Summer& summer_;
    BatchFiller<T> filler_;
    device::Tickets tickets_;
    bool holds_ = false;  // whether the last ticket is of a piece that is yet to be reduced
};

// Waits for room in a peer's ring, and reduces meanwhile what has come; a piece that is held is reduced first if it
// has. Called by a whole warp; returns whether there is room.
template <class T, class Summer>
__device__ bool help_until_room(const Link& link, const uint64_t* flag, uint64_t stamp, int peer,
                                Reducer<T, Summer>& reducer) {
    device::Patience patience;
    for (;;) {
        const uint64_t seen = threadIdx.x % kWarpSize == 0 ? ptx::load_acquire_sys(flag) : 0;
        const bool has_room = __shfl_sync(kAllLanes, static_cast<int>(seen >= stamp), 0) != 0;
        if (has_room && !reducer.holds()) return true;
        if (reducer.help()) {
            patience = {};
            continue;
        }
        if (has_room) return true;
        const bool lasts = threadIdx.x % kWarpSize != 0 || patience.lasts(link, stamp, seen, peer, Phase::kRoom);
        if (__all_sync(kAllLanes, lasts) == 0) return false;
    }
}

// Sums the rows of the groups that go to peers, and stores them there. Returns false when the exchange has failed.
template <bool kInLaps, class T, class Summer>
__device__ bool send_sums(const CombineParams& params, uint64_t epoch, const Cut& cut, Batch<T>& batch, Summer& summer,
                          Reducer<T, Summer>& reducer, Worker worker) {
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
            const uint64_t* flag = device::consumed_flag(link, peer, link.rank, slot * units + unit);
            const uint64_t stamp = device::group_stamp(epoch, lap - 1);
            int good = lane != 0 || ptx::load_acquire_sys(flag) >= stamp;
            if constexpr (kInLaps) good = good != 0 && !reducer.holds();
            if (__shfl_sync(kAllLanes, good, 0) == 0) {
                // NOTE: a peer may wait for the flag that is still pending before it makes room.
                flush();
                if constexpr (kInLaps) {
                    if (!help_until_room(link, flag, stamp, peer, reducer)) return false;
                } else {
                    good = lane != 0 || device::wait_for(link, flag, stamp, peer, Phase::kRoom);
                    if (__shfl_sync(kAllLanes, good, 0) == 0) return false;
                }
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

template <class T, bool kBulk, Mode kMode>
__global__ void __launch_bounds__(SummerOf<T, kBulk, kMode>::kWarps* kWarpSize)
    combine_rows(const __grid_constant__ CombineParams params) {
    using Summer = SummerOf<T, kBulk, kMode>;
    if constexpr (kBulk != Summer::kBulk) return;
    extern __shared__ uint4 memory[];
    uint64_t epoch;
    if (device::has_failed_for_block(params.link)) return;
    if (!device::join_exchange(params.link, params.opening, epoch)) return;
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
                  params.layout == Layout::kCompact ? kWantedUnits : kWantedUnitsOfChoices, kWantedUnitsInLaps);
    Summer summer(shared.stages, params, cut);
    Reducer<T, Summer> reducer(params, epoch, cut, *shared.batch, summer);
    constexpr bool kInLaps = kMode == Mode::kLaps;
    if (!sends || send_sums<kInLaps>(params, epoch, cut, *shared.batch, summer, reducer, worker)) {
        if constexpr (kInLaps) {
            reducer.run_in_laps();
        } else {
            reducer.run();
        }
    }
    // Stores read shared memory, which must outlive them.
    summer.drain();
}

template <class T, bool kBulk, Mode kMode>
constexpr int64_t kBlockBytes =
    WarpShared<T, SummerOf<T, kBulk, kMode>>::num_bytes() * SummerOf<T, kBulk, kMode>::kWarps;

template <class T, bool kBulk, Mode kMode>
void launch(const CombineParams& params, void* started, cudaStream_t stream) {
    const int num_blocks = params.num_senders + params.num_reducers;
    constexpr int kThreads = SummerOf<T, kBulk, kMode>::kWarps * kWarpSize;
    launch_with({.started = started}, "combine_rows", combine_rows<T, kBulk, kMode>, num_blocks, kThreads,
                kBlockBytes<T, kBulk, kMode>, stream, params);
}

// Loads a kernel and allows it its shared memory.
template <class T, bool kBulk, Mode kMode>
void prepare() {
    check_cuda(cudaFuncSetAttribute(combine_rows<T, kBulk, kMode>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(kBlockBytes<T, kBulk, kMode>)),
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

Mode mode_of(const CombineParams& params) {
    const RecordDims dims{params.rows.row_bytes, params.rows.meta_words};
    const int64_t num_groups = params.rows.max_chunks;
    if (params.link.num_ranks > 1 && num_groups > num_ring_groups(params.link.payload_bytes, dims)) return Mode::kLaps;
    return num_groups > kManyChunks ? Mode::kMany : Mode::kFew;
}

}  // namespace

void prepare_combine(bool bulk) {
    for (const Element element : {Element::kBf16, Element::kHalf, Element::kFloat, Element::kDouble}) {
        dispatch_element(element, [&](auto value) {
            using T = decltype(value);
            if (bulk) {
                prepare<T, true, Mode::kFew>();
                prepare<T, true, Mode::kMany>();
                prepare<T, true, Mode::kLaps>();
            }
            prepare<T, false, Mode::kFew>();
        });
    }
}

void launch_combine(const CombineParams& params, bool bulk, void* started, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_element(params.element, [&](auto value) {
        using T = decltype(value);
        if (!bulk) return launch<T, false, Mode::kFew>(params, started, on);
        switch (mode_of(params)) {
            case Mode::kFew:
                return launch<T, true, Mode::kFew>(params, started, on);
            case Mode::kMany:
                return launch<T, true, Mode::kMany>(params, started, on);
            case Mode::kLaps:
                return launch<T, true, Mode::kLaps>(params, started, on);
        }
    });
}

}  // namespace moe_ep
