// SPDX-License-Identifier: Apache-2.0
//
// One rank of a group of processes, and the one thing it can do: exchange messages with the others.
//
// Every collective is built from Exchange (collectives.h). An exchange moves all its messages at the same
// time, so it cannot deadlock within itself whatever their order, and messages of any length pass through
// rings of bounded size. Each message begins with a header; a peer that runs another call, or the same call
// with other arguments, is told apart from data at once.
//
// A rank that sees a peer end, or waits longer than the limit, fails; it marks itself as failed in shared
// memory, so the ranks that wait for it fail too instead of each waiting for its own limit. A failed
// communicator stays failed.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "hccl/error.h"
#include "hccl/segment.h"

namespace ascend_emulator::hccl {

/// What both ends of a message must agree on. `detail` is the reduce operation or the root.
struct Signature {
  HcclCMDType call;
  HcclDataType type;
  uint32_t detail;
};

struct Send {
  uint32_t to;
  const void* data;
  size_t bytes;
};

struct Receive {
  uint32_t from;
  void* data;
  size_t bytes;
};

struct CommunicatorOptions {
  std::string name;
  size_t buffer_bytes;
  std::chrono::seconds connect_timeout;
  /// How long an exchange waits without progress; none means for ever.
  std::optional<std::chrono::seconds> exchange_timeout;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// Blocks until all ranks have joined. Throws Error as Segment::Join does.
  Communicator(const Invitation& invitation, uint32_t num_ranks, uint32_t rank, CommunicatorOptions options);

  uint32_t rank() const { return rank_; }
  uint32_t size() const { return num_ranks_; }
  const std::string& name() const { return options_.name; }

  /// The code of the error that ended this communicator, HCCL_SUCCESS while it works. From any thread.
  HcclResult AsyncError() const { return failure_.load(); }

  /// Throws Error if the communicator has failed.
  void ThrowIfFailed() const;

  /// Sends and receives until all is done. Messages between two ranks keep their order; messages of no bytes
  /// are not sent. Data must not be touched meanwhile. Called by an issued operation only. Throws Error:
  /// HCCL_E_REMOTE if a peer ended, HCCL_E_TIMEOUT, HCCL_E_PARA if a peer's message is not the one that was
  /// expected; the communicator has then failed.
  void Exchange(const Signature& signature, const std::vector<Send>& sends,
                const std::vector<Receive>& receives);

  /// Hands `operation` to `enqueue` as a task that some thread has to run. Operations run in the order in
  /// which they were issued, also when their tasks are on different streams. A task that is dropped without
  /// having run fails the communicator: its peers wait for messages that will never come.
  void Issue(std::function<void(Communicator&)> operation,
             const std::function<void(std::function<void()>)>& enqueue);

  /// Ends what runs or waits with an error.
  void Abort();

 private:
  class Lane;
  class Turn;

  void Move(std::vector<Lane>& lanes);
  void ThrowIfPeerEnded(std::vector<Lane>& lanes) const;
  void Fail(HcclResult code, RankState state);

  const uint32_t rank_;
  const uint32_t num_ranks_;
  const CommunicatorOptions options_;
  const std::unique_ptr<Segment> segment_;
  std::atomic<HcclResult> failure_{HCCL_SUCCESS};

  std::mutex issue_mutex_;  // held until the task is on its stream, so that numbers and queues have one order
  uint64_t next_number_ = 0;

  std::mutex turn_mutex_;
  std::condition_variable turn_changed_;
  uint64_t turn_ = 0;
};

}  // namespace ascend_emulator::hccl
