#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/opening.cuh"
#include "host/checks.h"
#include "host/cuda_check.h"
#include "host/cuda_launch.h"
#include "kernels/dispatch_place.cuh"
#include "kernels/dispatch_place_bulk.cuh"
#include "kernels/dispatch_send.cuh"
#include "kernels/exchange.h"
#include "layout/plan.h"

// Senders walk this rank's chunks of tokens and store each row into the ring of every rank it goes to; placers walk the
// groups of all sources, as they arrive, and copy each row to its layout rows. This rank's own rows skip the ring.
// Senders that have nothing left to send place as well. On a direct route senders store each row where it stays, of
// expanded rows the first copy on each rank, and placers see to what is left: further copies, and what came beside.
// Beside the kernel that counts for it, the first lap is sent from when all tokens are numbered, and placers wait for
// the plan.
namespace moe_ep {
namespace {

using namespace dispatch;

// Warps that send and place rows at most, each with shared memory of its own. Launches that may lend have few pipes.
template <bool kBulk, bool kLends>
constexpr int kMaxRowWarps = !kBulk   ? kVectorWarps
                             : kLends ? device::kFewPipes.num_warps
                                      : device::kManyPipes.num_warps;

// Warps without a pipe, for what comes beside compact rows that are where they stay: many groups are on their way, few
// words of each, and all blocks send.
template <bool kBulk, bool kLends>
constexpr int kMetaWarps = kBulk && kLends ? 8 : 0;

template <bool kBulk, bool kLends>
constexpr int kMaxBlockThreads = kWarpSize * (kMaxRowWarps<kBulk, kLends> + kMetaWarps<kBulk, kLends>);

// Kernels that may begin beside the counting: direct routes follow from what it finds.
template <bool kBulk, bool kLends>
constexpr bool kMayBeEarly = kBulk && !kLends;

// Called by all threads of all blocks.
template <bool kBulk, class From, bool kLends>
__device__ __forceinline__ void send_and_place(const DispatchParams& params) {
    if (device::has_failed_for_block(params.link)) return;
    const int num_warps = kBulk ? params.num_pipes : kVectorWarps;
    extern __shared__ uint4 memory[];
    const bool sends = static_cast<int>(blockIdx.x) < params.num_senders;
    bool early = kMayBeEarly<kBulk, kLends> && params.num_counting > 0;
    uint64_t epoch;
    int64_t most_tokens = 0;
    if (early && sends) {
        if (!device::join_counting(params.link, params.opening, params.num_counting, epoch, most_tokens)) return;
    } else {
        if (early) {
            ptx::wait_for_kernel_before();
            // Without a plan there is nothing to place by.
            if (device::has_failed_for_block(params.link)) return;
        }
        early = false;
        if (!device::join_exchange(params.link, params.opening, epoch)) return;
    }
    if (device::has_fault(params.link, Fault::kEarlyExit) && params.rows.num_tokens == 0) return;
    const int warp = threadIdx.x / kWarpSize, block = static_cast<int>(blockIdx.x);
    const int stage_bytes = kBulk ? params.stage_bytes : 0;
    const int64_t warp_bytes = WarpShared(nullptr, stage_bytes, params.rows.top_k).num_bytes;
    const WarpShared shared(reinterpret_cast<std::byte*>(memory) + warp * warp_bytes, stage_bytes, params.rows.top_k);
    const int role_block = sends ? block : block - params.num_senders;
    const int role_blocks = sends ? params.num_senders : params.num_placers;
    // Neighbouring chunks go to different SMs.
    const Worker worker{role_block + static_cast<int64_t>(warp) * role_blocks,
                        static_cast<int64_t>(role_blocks) * num_warps};
    const int64_t out_row_bytes =
        params.rows.row_bytes * (std::is_same_v<From, NoCast> ? 1 : static_cast<int64_t>(sizeof(From)));
    const PlanTable table(params.rows.table, params.link.num_ranks, params.rows.num_experts);
    const Route<kLends> route(params, table);
    if (!early) most_tokens = *table.most_tokens;
    const bool places = params.laps != Laps::kFirst;
    const bool places_meta = places && route.is_direct() && params.layout == Layout::kCompact;
    if constexpr (kMetaWarps<kBulk, kLends> > 0) {
        if (warp >= num_warps) {
            if (places_meta && *table.overflow == 0) place_meta(params, route, epoch);
            return;
        }
    }
    // Without placers, senders see to it when they have sent all.
    const bool fills = places && (!sends || params.num_placers == 0);
    if (!early && *table.overflow != 0) {
        if (fills) poison_rows(params, worker, out_row_bytes);
        return;
    }
    if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        device::BulkPipe pipe(shared.stages, shared.barriers, stage_bytes);
        if (threadIdx.x % kWarpSize == 0) pipe.init();
        __syncwarp();
#pragma unroll 1
        for (Laps laps = early ? Laps::kFirst : params.laps; sends; laps = Laps::kLater) {
            send_rows_bulk(params, route, epoch, shared, pipe, worker, laps, most_tokens);
            if (!early) break;
            // Whether more may follow is known when all ranks' counts are.
            early = false;
            ptx::wait_for_kernel_before();
            __syncwarp();
            if (__any_sync(kAllLanes, device::has_failed(params.link)) != 0) return;
            if (*table.overflow != 0) {
                if (fills) poison_rows(params, worker, out_row_bytes);
                return;
            }
        }
        if (fills) fill_padding(params, worker, out_row_bytes);
        if (!places) return;
        if (places_meta) {
            place_meta(params, route, epoch);
        } else {
            place_rows_bulk(params, route, epoch, shared, pipe);
        }
        // Stores read shared memory, which must outlive them.
        ptx::wait_bulk_stores<0>();
#endif
    } else {
        if (sends) send_rows<From>(params, route, epoch, shared, worker, params.laps, most_tokens);
        if (fills) fill_padding(params, worker, out_row_bytes);
        if (!places) return;
        if (places_meta) {
            place_meta(params, route, epoch);
        } else {
            place_rows<From>(params, route, epoch, shared);
        }
    }
}

// Shared memory leaves room for one block of pipes per SM anyway, so that registers need not be saved there.
template <bool kBulk, class From, bool kLends>
__global__ void __launch_bounds__(kMaxBlockThreads<kBulk, kLends>, kBulk ? 1 : 2)
    dispatch_rows(const __grid_constant__ DispatchParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (kBulk) return;
#endif
    send_and_place<kBulk, From, kLends>(params);
    // Whatever has happened: what follows in the stream finds the counting ended too.
    if (kMayBeEarly<kBulk, kLends> && params.num_counting > 0) ptx::wait_for_kernel_before();
}

// Short rows wait for what has to be known of them more often, which counts where there are many.
constexpr int64_t kManyPipesRowBytes = 7168, kManyPipesTokens = 1024;

// By this rank's tokens, which are all that the host knows of the rows; a rank may have fewer than it receives.
device::PipeShape pipes_for(const DispatchParams& params) {
    const bool many = params.rows.row_bytes <= kManyPipesRowBytes && params.rows.num_tokens >= kManyPipesTokens;
    return many ? device::kManyPipes : device::kFewPipes;
}

template <bool kBulk, class From, bool kLends>
void launch(DispatchParams params, void* started, cudaStream_t stream) {
    if constexpr (kBulk) {
        const device::PipeShape shape = kLends ? device::kFewPipes : pipes_for(params);
        params.num_pipes = shape.num_warps;
        params.stage_bytes = shape.stage_bytes;
    }
    const int num_warps = kBulk ? params.num_pipes : kVectorWarps;
    const int64_t warp_bytes = WarpShared(nullptr, kBulk ? params.stage_bytes : 0, params.rows.top_k).num_bytes;
    const int num_blocks = params.num_senders + params.num_placers;
    const bool early = kMayBeEarly<kBulk, kLends> && params.num_counting > 0;
    launch_with({.started = started, .early = early}, "dispatch_rows", dispatch_rows<kBulk, From, kLends>, num_blocks,
                kWarpSize * (num_warps + kMetaWarps<kBulk, kLends>), num_warps * warp_bytes, stream, params);
}

// Loads a kernel and allows it the shared memory of the largest K.
template <bool kBulk, class From, bool kLends = false>
void prepare() {
    const auto bytes_of = [](int num_warps, int stage_bytes) {
        return num_warps * WarpShared(nullptr, stage_bytes, kMaxTopK).num_bytes;
    };
    const auto pipe_bytes = [&](device::PipeShape shape) { return bytes_of(shape.num_warps, shape.stage_bytes); };
    const int64_t shared_bytes = !kBulk   ? bytes_of(kVectorWarps, 0)
                                 : kLends ? pipe_bytes(device::kFewPipes)
                                          : std::max(pipe_bytes(device::kFewPipes), pipe_bytes(device::kManyPipes));
    check_cuda(cudaFuncSetAttribute(dispatch_rows<kBulk, From, kLends>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cudaFuncSetAttribute(dispatch_rows)");
}

template <class Index>
__global__ void drop_choices(Index* topk_idx, const int32_t* idx_in_expert, const int32_t* keep_choices,
                             int64_t num_choices, int num_experts) {
    const int64_t choice = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (choice >= num_choices) return;
    const Index expert = topk_idx[choice];
    if (expert < 0 || expert >= num_experts || idx_in_expert[choice] >= keep_choices[expert]) topk_idx[choice] = -1;
}

}  // namespace

void prepare_dispatch(bool bulk) {
    if (bulk) {
        prepare<true, NoCast>();
        prepare<true, NoCast, true>();
    }
    prepare<false, NoCast>();
    prepare<false, NoCast, true>();
    prepare<false, __nv_bfloat16>();
    prepare<false, __half>();
    prepare<false, float>();
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, drop_choices<int32_t>), "cudaFuncGetAttributes(drop_choices)");
    check_cuda(cudaFuncGetAttributes(&attributes, drop_choices<int64_t>), "cudaFuncGetAttributes(drop_choices)");
}

void launch_dispatch(const DispatchParams& params, bool bulk, void* started, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (params.cast) {
        case Cast::kNone:
            if (params.lends) {
                return bulk ? launch<true, NoCast, true>(params, started, on)
                            : launch<false, NoCast, true>(params, started, on);
            }
            return bulk ? launch<true, NoCast, false>(params, started, on)
                        : launch<false, NoCast, false>(params, started, on);
        case Cast::kFromBf16:
            return launch<false, __nv_bfloat16, false>(params, started, on);
        case Cast::kFromHalf:
            return launch<false, __half, false>(params, started, on);
        case Cast::kFromFloat:
            return launch<false, float, false>(params, started, on);
    }
}

void launch_drop(void* topk_idx, int index_bytes, const int32_t* idx_in_expert, const int32_t* keep_choices,
                 int64_t num_choices, int num_experts, void* stream) {
    if (num_choices == 0) return;
    constexpr int kThreads = 256;
    const auto num_blocks = static_cast<unsigned>((num_choices + kThreads - 1) / kThreads);
    dispatch_value<4, 8>("index_bytes", index_bytes, [&](auto bytes) {
        using Index = std::conditional_t<bytes == 4, int32_t, int64_t>;
        drop_choices<<<num_blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<Index*>(topk_idx), idx_in_expert, keep_choices, num_choices, num_experts);
    });
    check_cuda(cudaGetLastError(), "drop_choices");
}

}  // namespace moe_ep
