// SPDX-License-Identifier: Apache-2.0
//
// libhccl: the collectives. Each call checks its arguments, and puts the collective on its stream. A call of
// no elements does nothing on any rank, as on a card.
#include <acl/acl.h>

#include <string>
#include <utility>

#include "hccl/collectives.h"
#include "hccl/launch.h"
#include "hccl/reduce.h"
#include "third_party/hccl/inc/hccl/hccl.h"

using namespace ascend_emulator::hccl;

namespace {

void RequireBuffer(const char* name, const void* buffer, uint64_t count) {
  if (buffer == nullptr && count > 0) throw Error(HCCL_E_PTR, std::string(name) + " is a null pointer");
}

void RequireRank(const char* name, uint32_t rank, const Communicator& comm) {
  if (rank < comm.size()) return;
  throw Error(HCCL_E_PARA, std::string(name) + " is rank " + std::to_string(rank) + " of a communicator of " +
                               std::to_string(comm.size()) + " ranks");
}

Reduction RequireReduction(HcclDataType type, HcclReduceOp op) {
  CheckReduction(type, op);
  return {type, op};
}

void RequireSameType(HcclDataType send, HcclDataType recv) {
  ElementBytes(send);
  if (send != recv) throw Error(HCCL_E_PARA, "sendType and recvType differ; HCCL converts nothing");
}

/// The blocks that a pair of arrays of `num_ranks` uint64 values describes.
std::vector<Block> ReadBlocks(const void* counts, const void* displacements, uint32_t num_ranks) {
  if (counts == nullptr || displacements == nullptr)
    throw Error(HCCL_E_PTR, "the counts or displacements are null");
  const auto* count = static_cast<const uint64_t*>(counts);
  const auto* offset = static_cast<const uint64_t*>(displacements);
  std::vector<Block> blocks;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) blocks.push_back({offset[rank], count[rank]});
  return blocks;
}

uint64_t TotalCount(const std::vector<Block>& blocks) {
  uint64_t total = 0;
  for (const Block& block : blocks) total += block.count;
  return total;
}

Messages SendOf(const void* buffer, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle,
                aclrtStream stream) {
  auto comm = Find(handle);
  RequireRank("destRank", to, *comm);
  RequireBuffer("sendBuf", buffer, count);
  return {std::move(comm), stream, {{to, buffer, count * ElementBytes(type)}}, {}};
}

Messages ReceiveOf(void* buffer, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle,
                   aclrtStream stream) {
  auto comm = Find(handle);
  RequireRank("srcRank", from, *comm);
  RequireBuffer("recvBuf", buffer, count);
  return {std::move(comm), stream, {}, {{from, buffer, count * ElementBytes(type)}}};
}

}  // namespace

extern "C" {

HcclResult HcclAllReduce(void* send, void* recv, uint64_t count, HcclDataType type, HcclReduceOp op,
                         HcclComm handle, aclrtStream stream) {
  return Guarded("HcclAllReduce", [&] {
    auto comm = Find(handle);
    const Reduction reduction = RequireReduction(type, op);
    RequireBuffer("sendBuf", send, count);
    RequireBuffer("recvBuf", recv, count);
    Launch("HcclAllReduce", comm, stream,
           [=](Communicator& comm) { AllReduce(comm, send, recv, count, reduction); });
  });
}

HcclResult HcclReduce(void* send, void* recv, uint64_t count, HcclDataType type, HcclReduceOp op,
                      uint32_t root, HcclComm handle, aclrtStream stream) {
  return Guarded("HcclReduce", [&] {
    auto comm = Find(handle);
    const Reduction reduction = RequireReduction(type, op);
    RequireRank("root", root, *comm);
    RequireBuffer("sendBuf", send, count);
    if (comm->rank() == root) RequireBuffer("recvBuf", recv, count);
    Launch("HcclReduce", comm, stream,
           [=](Communicator& comm) { ReduceTo(comm, send, recv, count, reduction, root); });
  });
}

HcclResult HcclReduceScatter(void* send, void* recv, uint64_t recv_count, HcclDataType type, HcclReduceOp op,
                             HcclComm handle, aclrtStream stream) {
  return Guarded("HcclReduceScatter", [&] {
    auto comm = Find(handle);
    const Reduction reduction = RequireReduction(type, op);
    RequireBuffer("sendBuf", send, recv_count);
    RequireBuffer("recvBuf", recv, recv_count);
    Launch("HcclReduceScatter", comm, stream, [=](Communicator& comm) {
      ReduceScatter(comm, send, EvenBlocks(comm.size(), recv_count), recv, reduction);
    });
  });
}

HcclResult HcclReduceScatterV(void* send, const void* send_counts, const void* send_displacements, void* recv,
                              uint64_t recv_count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                              aclrtStream stream) {
  return Guarded("HcclReduceScatterV", [&] {
    auto comm = Find(handle);
    const Reduction reduction = RequireReduction(type, op);
    const std::vector<Block> blocks = ReadBlocks(send_counts, send_displacements, comm->size());
    if (blocks[comm->rank()].count != recv_count) {
      throw Error(HCCL_E_PARA, "recvCount is " + std::to_string(recv_count) + " and sendCounts has " +
                                   std::to_string(blocks[comm->rank()].count) + " for this rank");
    }
    RequireBuffer("sendBuf", send, TotalCount(blocks));
    RequireBuffer("recvBuf", recv, recv_count);
    Launch("HcclReduceScatterV", comm, stream,
           [=](Communicator& comm) { ReduceScatter(comm, send, blocks, recv, reduction); });
  });
}

HcclResult HcclAllGather(void* send, void* recv, uint64_t send_count, HcclDataType type, HcclComm handle,
                         aclrtStream stream) {
  return Guarded("HcclAllGather", [&] {
    auto comm = Find(handle);
    ElementBytes(type);
    RequireBuffer("sendBuf", send, send_count);
    RequireBuffer("recvBuf", recv, send_count);
    Launch("HcclAllGather", comm, stream, [=](Communicator& comm) {
      AllGather(comm, send, recv, EvenBlocks(comm.size(), send_count), type);
    });
  });
}

HcclResult HcclAllGatherV(void* send, uint64_t send_count, void* recv, const void* recv_counts,
                          const void* recv_displacements, HcclDataType type, HcclComm handle,
                          aclrtStream stream) {
  return Guarded("HcclAllGatherV", [&] {
    auto comm = Find(handle);
    ElementBytes(type);
    const std::vector<Block> blocks = ReadBlocks(recv_counts, recv_displacements, comm->size());
    if (blocks[comm->rank()].count != send_count) {
      throw Error(HCCL_E_PARA, "sendCount is " + std::to_string(send_count) + " and recvCounts has " +
                                   std::to_string(blocks[comm->rank()].count) + " for this rank");
    }
    RequireBuffer("sendBuf", send, send_count);
    RequireBuffer("recvBuf", recv, TotalCount(blocks));
    Launch("HcclAllGatherV", comm, stream,
           [=](Communicator& comm) { AllGather(comm, send, recv, blocks, type); });
  });
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                         aclrtStream stream) {
  return Guarded("HcclBroadcast", [&] {
    auto comm = Find(handle);
    ElementBytes(type);
    RequireRank("root", root, *comm);
    RequireBuffer("buf", buffer, count);
    Launch("HcclBroadcast", comm, stream,
           [=](Communicator& comm) { Broadcast(comm, buffer, count, type, root); });
  });
}

HcclResult HcclScatter(void* send, void* recv, uint64_t recv_count, HcclDataType type, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
  return Guarded("HcclScatter", [&] {
    auto comm = Find(handle);
    ElementBytes(type);
    RequireRank("root", root, *comm);
    if (comm->rank() == root) RequireBuffer("sendBuf", send, recv_count);
    RequireBuffer("recvBuf", recv, recv_count);
    Launch("HcclScatter", comm, stream,
           [=](Communicator& comm) { Scatter(comm, send, recv, recv_count, type, root); });
  });
}

HcclResult HcclAlltoAll(const void* send, uint64_t send_count, HcclDataType send_type, const void* recv,
                        uint64_t recv_count, HcclDataType recv_type, HcclComm handle, aclrtStream stream) {
  return Guarded("HcclAlltoAll", [&] {
    auto comm = Find(handle);
    RequireSameType(send_type, recv_type);
    if (send_count != recv_count)
      throw Error(HCCL_E_PARA, "sendCount and recvCount differ; use HcclAlltoAllV");
    RequireBuffer("sendBuf", send, send_count);
    RequireBuffer("recvBuf", recv, recv_count);
    void* received = const_cast<void*>(recv);  // HCCL's header has it const, though it is written
    Launch("HcclAlltoAll", comm, stream, [=](Communicator& comm) {
      const std::vector<Block> blocks = EvenBlocks(comm.size(), send_count);
      AllToAll(comm, send, blocks, send_type, received, blocks);
    });
  });
}

HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_displacements,
                         HcclDataType send_type, const void* recv, const void* recv_counts,
                         const void* recv_displacements, HcclDataType recv_type, HcclComm handle,
                         aclrtStream stream) {
  return Guarded("HcclAlltoAllV", [&] {
    auto comm = Find(handle);
    RequireSameType(send_type, recv_type);
    const std::vector<Block> send_blocks = ReadBlocks(send_counts, send_displacements, comm->size());
    const std::vector<Block> recv_blocks = ReadBlocks(recv_counts, recv_displacements, comm->size());
    if (send_blocks[comm->rank()].count != recv_blocks[comm->rank()].count) {
      throw Error(HCCL_E_PARA, "this rank sends itself " + std::to_string(send_blocks[comm->rank()].count) +
                                   " elements and expects " +
                                   std::to_string(recv_blocks[comm->rank()].count));
    }
    RequireBuffer("sendBuf", send, TotalCount(send_blocks));
    RequireBuffer("recvBuf", recv, TotalCount(recv_blocks));
    void* received = const_cast<void*>(recv);  // as in HcclAlltoAll
    Launch("HcclAlltoAllV", comm, stream,
           [=](Communicator& comm) { AllToAll(comm, send, send_blocks, send_type, received, recv_blocks); });
  });
}

HcclResult HcclSend(void* buffer, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle,
                    aclrtStream stream) {
  return Guarded("HcclSend",
                 [&] { LaunchOrGroup("HcclSend", SendOf(buffer, count, type, to, handle, stream)); });
}

HcclResult HcclRecv(void* buffer, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle,
                    aclrtStream stream) {
  return Guarded("HcclRecv",
                 [&] { LaunchOrGroup("HcclRecv", ReceiveOf(buffer, count, type, from, handle, stream)); });
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t num_items, HcclComm handle,
                             aclrtStream stream) {
  return Guarded("HcclBatchSendRecv", [&] {
    RequireBuffer("sendRecvInfo", items, num_items);
    Messages all{Find(handle), stream, {}, {}};
    for (uint32_t i = 0; i < num_items; ++i) {
      const HcclSendRecvItem& item = items[i];
      if (item.sendRecvType == HCCL_SEND) {
        const Messages one = SendOf(item.buf, item.count, item.dataType, item.remoteRank, handle, stream);
        all.sends.push_back(one.sends.front());
      } else if (item.sendRecvType == HCCL_RECV) {
        const Messages one = ReceiveOf(item.buf, item.count, item.dataType, item.remoteRank, handle, stream);
        all.receives.push_back(one.receives.front());
      } else {
        throw Error(HCCL_E_PARA, "item " + std::to_string(i) + " is neither HCCL_SEND nor HCCL_RECV");
      }
    }
    LaunchOrGroup("HcclBatchSendRecv", std::move(all));
  });
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
  return Guarded("HcclBarrier", [&] {
    Launch("HcclBarrier", Find(handle), stream, [](Communicator& comm) { Barrier(comm); });
  });
}

}  // extern "C"
