// SPDX-License-Identifier: Apache-2.0
//
// The collectives as exchanges of messages. All of them block until this rank's part is done, run on the
// thread of the stream that the caller chose, and work on host memory. They are called by an operation that
// was given to Communicator::Issue and throw what Communicator::Exchange throws.
//
// Buffers of `count` elements hold ElementBytes(type) bytes for each. Receive buffers may be the send buffer
// where HCCL allows it: all-reduce, reduce, and all-gather and reduce-scatter with this rank's block at its
// place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hccl/communicator.h"

namespace ascend_emulator::hccl {

/// The part of a buffer that belongs to one rank, in elements.
struct Block {
  uint64_t offset;
  uint64_t count;
};

/// `num_ranks` blocks of `count` elements, one behind the other.
std::vector<Block> EvenBlocks(uint32_t num_ranks, uint64_t count);

struct Reduction {
  HcclDataType type;
  HcclReduceOp op;
};

void AllReduce(Communicator& comm, const void* send, void* recv, uint64_t count, Reduction reduction);

/// `recv` is written on `root` only.
void ReduceTo(Communicator& comm, const void* send, void* recv, uint64_t count, Reduction reduction,
              uint32_t root);

/// `blocks`: where in `send` the elements for each rank are; the counts are the same on all ranks.
void ReduceScatter(Communicator& comm, const void* send, const std::vector<Block>& blocks, void* recv,
                   Reduction reduction);

/// `blocks`: where in `recv` the elements of each rank go; the counts are the same on all ranks.
void AllGather(Communicator& comm, const void* send, void* recv, const std::vector<Block>& blocks,
               HcclDataType type);

void Broadcast(Communicator& comm, void* buffer, uint64_t count, HcclDataType type, uint32_t root);

/// `send` is read on `root` only: `count` elements for every rank.
void Scatter(Communicator& comm, const void* send, void* recv, uint64_t count, HcclDataType type,
             uint32_t root);

/// What goes to whom may differ between ranks, as long as both sides of each pair agree.
void AllToAll(Communicator& comm, const void* send, const std::vector<Block>& send_blocks, HcclDataType type,
              void* recv, const std::vector<Block>& recv_blocks);

void Barrier(Communicator& comm);

}  // namespace ascend_emulator::hccl
