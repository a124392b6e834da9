#pragma once

#include <cstdint>

#include "device/link.cuh"

// Opening an exchange: every rank stores a message into every arena, its own included, waits for those of its peers,
// and compares headers. A peer whose message has come has finished the exchange before, so its ring may be written
// again.
namespace moe_ep::device {

static_assert(kWarpSize % kHeaderWords == 0, "a header is compared by lanes of one warp");

__device__ inline void store_opening_word(const Link& link, int peer, int word, int32_t value, uint64_t epoch) {
    const uint64_t stamped = epoch << 32 | static_cast<uint32_t>(value);
    ptx::store_relaxed_sys(link.arena(peer).opening_from(link.rank, epoch) + word, stamped);
}

// Stores this rank's header. Called by a whole block. What this rank has read of its arena before comes first.
__device__ inline void send_header(const Link& link, const int32_t* header, uint64_t epoch) {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < link.num_ranks * kHeaderWords;
         at += static_cast<int>(blockDim.x)) {
        ptx::fence_acq_rel_sys();
        store_opening_word(link, at / kHeaderWords, at % kHeaderWords, header[at % kHeaderWords], epoch);
    }
}

// Waits for one word of a peer's message. Returns false when the exchange has failed.
__device__ inline bool wait_for_opening(const Link& link, int peer, int word, uint64_t epoch, int32_t& value) {
    const uint64_t* from = link.arena(link.rank).opening_from(peer, epoch) + word;
    uint64_t stamped = ptx::load_acquire_sys(from);
    bool good = true;
    if (!is_of_exchange(stamped, epoch)) {
        good = wait_longer(link, from, epoch, peer, Phase::kOpening);
        stamped = ptx::load_relaxed_sys(from);
    }
    value = static_cast<int32_t>(stamped);
    return good;
}

// Waits for the headers of all peers, and compares them with this rank's. Called by a whole block; returns on all
// threads whether the exchange goes on.
__device__ inline bool receive_headers(const Link& link, const int32_t* header, uint64_t epoch) {
    bool good = true;
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < link.num_ranks * kHeaderWords;
         at += static_cast<int>(blockDim.x)) {
        // Lanes of one peer go on together, whatever others wait for.
        const int peer = at / kHeaderWords, word = at % kHeaderWords, lane = at % kWarpSize;
        const uint32_t of_peer = ((1u << kHeaderWords) - 1) << (lane / kHeaderWords * kHeaderWords);
        int32_t theirs = 0;
        const bool came = wait_for_opening(link, peer, word, epoch, theirs);
        const bool compared = word != kHeaderStatus && word != kHeaderNote;
        const bool all_came = __all_sync(of_peer, came) != 0;
        const bool aborts = __any_sync(of_peer, word == kHeaderStatus && theirs != 0) != 0;
        const bool differs = __any_sync(of_peer, compared && theirs != header[word]) != 0;
        const bool peer_good = all_came && !aborts && !differs;
        good = good && peer_good;
        if (all_came && !peer_good && word == 0) {
            report(link, aborts ? Trouble::kAborted : Trouble::kMismatch, peer, Phase::kOpening, epoch, epoch,
                   link.arena(link.rank).opening_from(peer, epoch), header);
        }
    }
    return __syncthreads_and(good) != 0;
}

// Lets a dispatch that runs beside its counting begin. Called by a whole block of those that count, of which the first
// notes whose exchange it is.
// NOTE: a kernel that has begun so is only promised to see this word once the kernel before has ended; it does earlier,
// since the fence ends when the word is in L2, where the other reads it.
__device__ inline void note_counting(const Link& link, uint64_t epoch) {
    if (threadIdx.x != 0) return;
    if (blockIdx.x == 0) {
        ptx::store_relaxed_gpu(&link.state->counting, epoch);
        __threadfence();
    }
    ptx::launch_dependents();
}

// Tells a dispatch beside that this block has numbered its tokens. Called by a whole block.
__device__ inline void note_numbered(const Link& link, uint64_t epoch) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    ptx::store_relaxed_gpu(&link.state->numbered[blockIdx.x], epoch);
}

// Waits until a block of those that count has come to where it sets its word to this exchange's number.
__device__ inline bool wait_for_block(const Link& link, const uint64_t* word, uint64_t epoch) {
    Patience patience;
    for (;;) {
        const uint64_t seen = ptx::load_acquire_gpu(word);
        if (seen == epoch) return true;
        if (!patience.lasts(link, epoch, seen, link.rank, Phase::kOpening)) return false;
    }
}

// Joins an exchange that is still being counted: afterwards rows may be sent as this rank's plan numbers them. Called
// by a whole block; returns on all threads whether the exchange goes on, its number, and the largest T of any rank.
__device__ inline bool join_counting(const Link& link, const Opening& opening, int num_counting, uint64_t& epoch,
                                     int64_t& most_tokens) {
    epoch = ptx::load_relaxed_gpu(&link.state->counting);
    if (!receive_headers(link, opening.header, epoch)) return false;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    int32_t tokens = 0;
    bool good = thread >= link.num_ranks || wait_for_opening(link, thread, kHeaderWords, epoch, tokens);
#pragma unroll 1
    for (int block = thread; block < num_counting && good; block += static_cast<int>(blockDim.x)) {
        good = wait_for_block(link, &link.state->numbered[block], epoch);
    }
    if (__syncthreads_and(good) == 0) return false;
    if (lane < link.num_ranks) {
        tokens =
            static_cast<int32_t>(ptx::load_relaxed_sys(link.arena(link.rank).opening_from(lane, epoch) + kHeaderWords));
    }
    most_tokens = __reduce_max_sync(kAllLanes, tokens);
    return true;
}

// Everything that kernels of this exchange ask of the state is there afterwards. Called by one thread, once nothing of
// the kernel reads the number of the exchange before.
__device__ inline void note_opened(const Link& link, uint64_t epoch) {
    *link.state->tickets_of(epoch + 1) = 0;
    link.state->epoch = epoch;
}

// Counts the blocks of a kernel that opens an exchange. Called by one thread of each; returns whether it is the last.
__device__ inline bool is_last_block(const Link& link) {
    // What other threads of the block have done comes before; what other blocks have done is seen afterwards.
    __threadfence();
    const bool last = atomicAdd(&link.state->blocks, 1u) == gridDim.x - 1;
    __threadfence();
    if (last) link.state->blocks = 0;
    return last;
}

// The number of the current exchange, which is opened here if the kernel is to do that. Called by all threads of all
// blocks, before anything else; returns on all threads whether the exchange goes on.
__device__ inline bool join_exchange(const Link& link, const Opening& opening, uint64_t& epoch) {
    epoch = link.state->epoch;
    if (opening.opens == 0) return true;
    ++epoch;
    if (blockIdx.x == 0) send_header(link, opening.header, epoch);
    const bool good = receive_headers(link, opening.header, epoch);
    // All threads have read the state: they have come here.
    if (threadIdx.x == blockDim.x - 1 && is_last_block(link)) note_opened(link, epoch);
    return good;
}

}  // namespace moe_ep::device
