// SPDX-License-Identifier: Apache-2.0
//
// A stream of bytes from one rank to another: a ring in shared memory with one writer and one reader.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ascend_emulator::hccl {

/// Lies in shared memory before the ring's bytes. All zero is an empty ring.
struct RingCursors {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
};

// Two processes share the cursors, so they must not hide a lock of one of them.
static_assert(std::atomic<uint64_t>::is_always_lock_free);

/// A view of a ring; copying it copies nothing in shared memory. Never blocks.
class Ring {
 public:
  Ring(RingCursors* cursors, std::byte* bytes, size_t capacity)
      : cursors_(cursors), bytes_(bytes), capacity_(capacity) {}

  /// Appends as much of `size` bytes as there is room for and returns how much that was. Called by the writer
  /// only.
  size_t Write(const std::byte* data, size_t size) {
    const uint64_t written = cursors_->written.load(std::memory_order_relaxed);
    const uint64_t read = cursors_->read.load(std::memory_order_acquire);
    const size_t moved = std::min<size_t>(size, capacity_ - (written - read));
    ForEachRun(written, moved,
               [&](size_t at, size_t done, size_t length) { std::memcpy(bytes_ + at, data + done, length); });
    cursors_->written.store(written + moved, std::memory_order_release);
    return moved;
  }

  /// Takes as much of `size` bytes as has arrived and returns how much that was. Called by the reader only.
  size_t Read(std::byte* data, size_t size) {
    const uint64_t read = cursors_->read.load(std::memory_order_relaxed);
    const uint64_t written = cursors_->written.load(std::memory_order_acquire);
    const size_t moved = std::min<size_t>(size, written - read);
    ForEachRun(read, moved,
               [&](size_t at, size_t done, size_t length) { std::memcpy(data + done, bytes_ + at, length); });
    cursors_->read.store(read + moved, std::memory_order_release);
    return moved;
  }

 private:
  template <typename Copy>
  void ForEachRun(uint64_t position, size_t size, Copy copy) const {
    if (size == 0) return;
    const size_t at = position % capacity_;
    const size_t until_end = std::min(size, capacity_ - at);
    copy(at, 0, until_end);
    if (size > until_end) copy(0, until_end, size - until_end);
  }

  RingCursors* cursors_;
  std::byte* bytes_;
  size_t capacity_;
};

}  // namespace ascend_emulator::hccl
