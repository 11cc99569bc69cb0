// SPDX-License-Identifier: Apache-2.0
//
// Every collective as a list of sends and receives, cut into pieces where a result has to be computed from
// them.
#include "hccl/collectives.h"

#include <algorithm>
#include <cstring>

#include "hccl/reduce.h"

namespace ascend_emulator::hccl {
namespace {

/// Bytes of one rank's contribution that are reduced at a time: what a rank needs as scratch for each peer.
constexpr size_t kPieceBytes = size_t{256} << 10;

/// Up to this many bytes an all-reduce is one exchange of everything instead of two exchanges of parts: each
/// exchange costs a change of the running process, which is dearer than reducing a little on every rank.
constexpr size_t kOneExchangeBytes = size_t{32} << 10;

const std::byte* At(const void* data, size_t bytes) { return static_cast<const std::byte*>(data) + bytes; }
std::byte* At(void* data, size_t bytes) { return static_cast<std::byte*>(data) + bytes; }

/// The peers of `comm.rank()`, beginning with the next rank, so that not all ranks turn to rank 0 first.
std::vector<uint32_t> Peers(const Communicator& comm) {
  std::vector<uint32_t> peers;
  for (uint32_t step = 1; step < comm.size(); ++step) peers.push_back((comm.rank() + step) % comm.size());
  return peers;
}

void CopyOwn(void* to, const void* from, size_t bytes) {
  if (bytes > 0 && to != from) std::memmove(to, from, bytes);
}

uint64_t LargestCount(const std::vector<Block>& blocks) {
  uint64_t largest = 0;
  for (const Block& block : blocks) largest = std::max(largest, block.count);
  return largest;
}

/// The elements [start, start + most) of a block, as far as it has them.
Block Piece(const Block& block, uint64_t start, uint64_t most) {
  const uint64_t first = std::min(start, block.count);
  return {block.offset + first, std::min(most, block.count - first)};
}

/// A place for the contribution of every rank to the elements that this rank reduces.
class Contributions {
 public:
  Contributions(const Communicator& comm, size_t bytes_per_rank)
      : rank_(comm.rank()), stride_(bytes_per_rank), bytes_(bytes_per_rank * comm.size()) {}

  void* From(uint32_t rank) { return bytes_.data() + rank * stride_; }

  /// Reduces in the order of ranks; this rank's contribution is at `own`.
  void ReduceInto(void* result, const void* own, uint64_t count, Reduction reduction) {
    if (count == 0) return;
    std::vector<const void*> inputs;
    for (size_t rank = 0; rank * stride_ < bytes_.size(); ++rank) {
      inputs.push_back(rank == rank_ ? own : bytes_.data() + rank * stride_);
    }
    Reduce(reduction.type, reduction.op, inputs, count, result);
  }

 private:
  uint32_t rank_;
  size_t stride_;
  std::vector<std::byte> bytes_;
};

Signature SignatureOf(HcclCMDType call, Reduction reduction) {
  return {call, reduction.type, static_cast<uint32_t>(reduction.op)};
}

/// A reduce-scatter of `blocks` on behalf of `call`.
void ReduceParts(Communicator& comm, HcclCMDType call, const void* send, const std::vector<Block>& blocks,
                 void* recv, Reduction reduction) {
  const size_t element_bytes = ElementBytes(reduction.type);
  const uint64_t longest = LargestCount(blocks);
  const uint64_t piece_count = std::min<uint64_t>(longest, kPieceBytes / element_bytes);
  Contributions contributions(comm, piece_count * element_bytes);
  for (uint64_t start = 0; start < longest; start += piece_count) {
    const Block own = Piece(blocks[comm.rank()], start, piece_count);
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (const uint32_t peer : Peers(comm)) {
      const Block theirs = Piece(blocks[peer], start, piece_count);
      sends.push_back({peer, At(send, theirs.offset * element_bytes), theirs.count * element_bytes});
      receives.push_back({peer, contributions.From(peer), own.count * element_bytes});
    }
    comm.Exchange(SignatureOf(call, reduction), sends, receives);
    contributions.ReduceInto(At(recv, start * element_bytes), At(send, own.offset * element_bytes), own.count,
                             reduction);
  }
}

/// An all-gather of `blocks` on behalf of `call`.
void GatherParts(Communicator& comm, HcclCMDType call, const void* send, void* recv,
                 const std::vector<Block>& blocks, HcclDataType type) {
  const size_t element_bytes = ElementBytes(type);
  const Block& own = blocks[comm.rank()];
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const uint32_t peer : Peers(comm)) {
    sends.push_back({peer, send, own.count * element_bytes});
    receives.push_back(
        {peer, At(recv, blocks[peer].offset * element_bytes), blocks[peer].count * element_bytes});
  }
  comm.Exchange({call, type, 0}, sends, receives);
  CopyOwn(At(recv, own.offset * element_bytes), send, own.count * element_bytes);
}

void AllReduceInOneExchange(Communicator& comm, const void* send, void* recv, uint64_t count,
                            Reduction reduction) {
  const size_t bytes = count * ElementBytes(reduction.type);
  Contributions contributions(comm, bytes);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const uint32_t peer : Peers(comm)) {
    sends.push_back({peer, send, bytes});
    receives.push_back({peer, contributions.From(peer), bytes});
  }
  comm.Exchange(SignatureOf(HCCL_CMD_ALLREDUCE, reduction), sends, receives);
  contributions.ReduceInto(recv, send, count, reduction);
}

}  // namespace

std::vector<Block> EvenBlocks(uint32_t num_ranks, uint64_t count) {
  std::vector<Block> blocks;
  for (uint64_t rank = 0; rank < num_ranks; ++rank) blocks.push_back({rank * count, count});
  return blocks;
}

void AllReduce(Communicator& comm, const void* send, void* recv, uint64_t count, Reduction reduction) {
  if (count * ElementBytes(reduction.type) <= kOneExchangeBytes) {
    return AllReduceInOneExchange(comm, send, recv, count, reduction);
  }
  std::vector<Block> parts;
  for (uint64_t rank = 0; rank < comm.size(); ++rank) {
    const uint64_t start = count * rank / comm.size();
    parts.push_back({start, count * (rank + 1) / comm.size() - start});
  }
  std::byte* own = At(recv, parts[comm.rank()].offset * ElementBytes(reduction.type));
  ReduceParts(comm, HCCL_CMD_ALLREDUCE, send, parts, own, reduction);
  GatherParts(comm, HCCL_CMD_ALLREDUCE, own, recv, parts, reduction.type);
}

void ReduceTo(Communicator& comm, const void* send, void* recv, uint64_t count, Reduction reduction,
              uint32_t root) {
  std::vector<Block> blocks(comm.size(), Block{0, 0});
  blocks[root].count = count;
  ReduceParts(comm, HCCL_CMD_REDUCE, send, blocks, recv, reduction);
}

void ReduceScatter(Communicator& comm, const void* send, const std::vector<Block>& blocks, void* recv,
                   Reduction reduction) {
  ReduceParts(comm, HCCL_CMD_REDUCE_SCATTER, send, blocks, recv, reduction);
}

void AllGather(Communicator& comm, const void* send, void* recv, const std::vector<Block>& blocks,
               HcclDataType type) {
  GatherParts(comm, HCCL_CMD_ALLGATHER, send, recv, blocks, type);
}

void Broadcast(Communicator& comm, void* buffer, uint64_t count, HcclDataType type, uint32_t root) {
  const size_t bytes = count * ElementBytes(type);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  if (comm.rank() == root) {
    for (const uint32_t peer : Peers(comm)) sends.push_back({peer, buffer, bytes});
  } else {
    receives.push_back({root, buffer, bytes});
  }
  comm.Exchange({HCCL_CMD_BROADCAST, type, root}, sends, receives);
}

void Scatter(Communicator& comm, const void* send, void* recv, uint64_t count, HcclDataType type,
             uint32_t root) {
  const size_t bytes = count * ElementBytes(type);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  if (comm.rank() == root) {
    for (const uint32_t peer : Peers(comm)) sends.push_back({peer, At(send, peer * bytes), bytes});
  } else {
    receives.push_back({root, recv, bytes});
  }
  comm.Exchange({HCCL_CMD_SCATTER, type, root}, sends, receives);
  if (comm.rank() == root) CopyOwn(recv, At(send, root * bytes), bytes);
}

void AllToAll(Communicator& comm, const void* send, const std::vector<Block>& send_blocks, HcclDataType type,
              void* recv, const std::vector<Block>& recv_blocks) {
  const size_t element_bytes = ElementBytes(type);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const uint32_t peer : Peers(comm)) {
    const Block& to = send_blocks[peer];
    const Block& from = recv_blocks[peer];
    sends.push_back({peer, At(send, to.offset * element_bytes), to.count * element_bytes});
    receives.push_back({peer, At(recv, from.offset * element_bytes), from.count * element_bytes});
  }
  comm.Exchange({HCCL_CMD_ALLTOALL, type, 0}, sends, receives);
  const Block& own = send_blocks[comm.rank()];
  CopyOwn(At(recv, recv_blocks[comm.rank()].offset * element_bytes), At(send, own.offset * element_bytes),
          own.count * element_bytes);
}

void Barrier(Communicator& comm) {
  const std::byte here{1};
  std::vector<std::byte> there(comm.size());
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (const uint32_t peer : Peers(comm)) {
    sends.push_back({peer, &here, 1});
    receives.push_back({peer, &there[peer], 1});
  }
  comm.Exchange({HCCL_CMD_BARRIER, HCCL_DATA_TYPE_UINT8, 0}, sends, receives);
}

}  // namespace ascend_emulator::hccl
