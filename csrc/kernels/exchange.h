#pragma once

#include <string>

#include "layout/exchange.h"

namespace moe_ep {

// All of them only enqueue work on a stream of the current device. `stream` is a cudaStream_t; raise LibraryError when
// CUDA refuses a launch.

// Loads every kernel of an exchange. A first launch would otherwise load it, which waits for the kernels that run, and
// those may wait for a peer that waits for this launch. `bulk`: those that use the copy engine too.
void prepare_kernels();
void prepare_open();
void prepare_counting();
void prepare_dispatch(bool bulk);
void prepare_combine(bool bulk);

// Why the kernels of this build do not run on the current device, as CUDA says it; empty where they do.
std::string kernel_problem();

// Whether launches can record an event once all blocks have their SMs, or begin early: CUDA and drivers since 12.3.
bool launches_tell_start();

// Compares headers with all peers.
void launch_open(const Link& link, const Opening& opening, void* stream);

// Plans a dispatch, compares headers, exchanges counts and writes the plan's table.
void launch_count(const PlanParams& plan, const OpenParams& params, void* stream);

// Turns choices that their experts do not keep into -1: topk_idx [T, K] of index_bytes bytes, in place.
void launch_drop(void* topk_idx, int index_bytes, const int32_t* idx_in_expert, const int32_t* keep_choices,
                 int64_t num_choices, int num_experts, void* stream);

// `started` is a cudaEvent_t that the launch records once all blocks have their SMs, which computation on other streams
// may want as well; or null.

// Sends rows and places those that arrive, with copies by the copy engine where `bulk`, else by vector loads and
// stores.
void launch_dispatch(const DispatchParams& params, bool bulk, void* started, void* stream);

// Sums layout rows per source token, sends the sums home, and adds up those that arrive; `bulk` as above.
void launch_combine(const CombineParams& params, bool bulk, void* started, void* stream);

// A kernel without work: edges of a graph that begin where a kernel has started have to lead to a kernel.
void launch_nothing(void* stream);

}  // namespace moe_ep
