#pragma once

#include <cstdint>

#include "layout/cursor.h"

namespace moe_ep {

// A region of `num_rows` rows of `row_elements` values of T each, every row starting right behind the one before.
template <class T>
struct Buffer {
    T* ptr;
    int64_t num_rows;
    int64_t row_elements;

    MOE_EP_HOST_DEVICE Buffer(Cursor& cursor, int64_t num_rows, int64_t row_elements = 1)
        : Buffer(cursor.take<T>(num_rows * row_elements), num_rows, row_elements) {}

    MOE_EP_HOST_DEVICE Buffer(T* ptr, int64_t num_rows, int64_t row_elements)
        : ptr(ptr), num_rows(num_rows), row_elements(row_elements) {}

    MOE_EP_HOST_DEVICE T* row(int64_t row_idx) const { return ptr + row_idx * row_elements; }
    MOE_EP_HOST_DEVICE T& operator[](int64_t element_idx) const { return ptr[element_idx]; }

    // Returns rows first .. first + count - 1 as a buffer of their own.
    MOE_EP_HOST_DEVICE Buffer slice(int64_t first, int64_t count) const {
        return Buffer(row(first), count, row_elements);
    }
};

// One region per peer, written from one side only: region i of a rank's arena is what rank i stores there.
// A sender carves the same layout over its mapping of the peer's arena and takes the region of its own rank.
template <class T>
struct AsymBuffer {
    Buffer<T> all;
    int64_t rows_per_peer;

    MOE_EP_HOST_DEVICE AsymBuffer(Cursor& cursor, int64_t num_peers, int64_t rows_per_peer, int64_t row_elements = 1)
        : all(cursor, num_peers * rows_per_peer, row_elements), rows_per_peer(rows_per_peer) {}

    MOE_EP_HOST_DEVICE Buffer<T> from(int64_t peer) const { return all.slice(peer * rows_per_peer, rows_per_peer); }
};

// A send and a receive region per peer at the same offsets on every rank, as one-sided puts need it: what is put
// together in send_to(p) lands in received_from(me) of rank p. Decoupled regions have memory of their own; coupled ones
// share it, for values such as flags and counts that are written in place and never wait for a transfer out of the same
// words.
template <class T, bool kDecoupled = true>
struct SymBuffer {
    AsymBuffer<T> send;
    AsymBuffer<T> receive;

    MOE_EP_HOST_DEVICE SymBuffer(Cursor& cursor, int64_t num_peers, int64_t rows_per_peer, int64_t row_elements = 1)
        : send(cursor, num_peers, rows_per_peer, row_elements),
          receive(kDecoupled ? AsymBuffer<T>(cursor, num_peers, rows_per_peer, row_elements) : send) {}

    MOE_EP_HOST_DEVICE Buffer<T> send_to(int64_t peer) const { return send.from(peer); }
    MOE_EP_HOST_DEVICE Buffer<T> received_from(int64_t peer) const { return receive.from(peer); }
};

}  // namespace moe_ep
