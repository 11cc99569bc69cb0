// SPDX-License-Identifier: Apache-2.0
//
// The exchange of messages through shared rings, and what ends it; see communicator.h.
#include "hccl/communicator.h"

#include <algorithm>
#include <utility>

#include "hccl/patience.h"
#include "hccl/reduce.h"

namespace ascend_emulator::hccl {
namespace {

/// Precedes every message.
struct Header {
  uint32_t call;
  uint32_t type;
  uint32_t detail;
  uint32_t unused;
  uint64_t bytes;
};

const char* NameOfCall(uint32_t call) {
  switch (call) {
    case HCCL_CMD_ALLGATHER:
      return "all-gather";
    case HCCL_CMD_ALLREDUCE:
      return "all-reduce";
    case HCCL_CMD_ALLTOALL:
      return "all-to-all";
    case HCCL_CMD_BARRIER:
      return "barrier";
    case HCCL_CMD_BROADCAST:
      return "broadcast";
    case HCCL_CMD_REDUCE:
      return "reduce";
    case HCCL_CMD_REDUCE_SCATTER:
      return "reduce-scatter";
    case HCCL_CMD_SCATTER:
      return "scatter";
    case HCCL_CMD_SEND:
      return "send";
    default:
      return "unknown call";
  }
}

std::string Describe(const Header& header) {
  return std::string(NameOfCall(header.call)) + ", " + NameOf(static_cast<HcclDataType>(header.type)) +
         ", reduce operation or root " + std::to_string(header.detail) + ", " + std::to_string(header.bytes) +
         " bytes";
}

bool Same(const Header& left, const Header& right) {
  return left.call == right.call && left.type == right.type && left.detail == right.detail &&
         left.bytes == right.bytes;
}

}  // namespace

/// The messages of one exchange from one rank to another, and how far they have come.
class Communicator::Lane {
 public:
  enum class Direction { kSend, kReceive };

  Lane(Direction direction, uint32_t peer, Ring ring) : direction_(direction), peer_(peer), ring_(ring) {}

  void Add(const Signature& signature, std::byte* data, size_t bytes) {
    const Header header{static_cast<uint32_t>(signature.call), static_cast<uint32_t>(signature.type),
                        signature.detail, 0, bytes};
    messages_.push_back({header, data});
  }

  uint32_t peer() const { return peer_; }
  bool Done() const { return current_ == messages_.size(); }

  /// Moves what can be moved without waiting. Returns whether that was anything.
  bool Advance() {
    bool moved = false;
    while (!Done() && (direction_ == Direction::kSend ? AdvanceSend() : AdvanceReceive())) moved = true;
    return moved;
  }

 private:
  struct Message {
    Header header;
    std::byte* data;
  };

  bool AdvanceSend() {
    const Message& message = messages_[current_];
    const auto* header = reinterpret_cast<const std::byte*>(&message.header);
    size_t moved = 0;
    if (header_done_ < sizeof(Header)) {
      moved = ring_.Write(header + header_done_, sizeof(Header) - header_done_);
      header_done_ += moved;
    } else {
      moved = ring_.Write(message.data + data_done_, message.header.bytes - data_done_);
      data_done_ += moved;
    }
    NextIfComplete(message);
    return moved > 0;
  }

  bool AdvanceReceive() {
    const Message& message = messages_[current_];
    auto* header = reinterpret_cast<std::byte*>(&received_);
    size_t moved = 0;
    if (header_done_ < sizeof(Header)) {
      moved = ring_.Read(header + header_done_, sizeof(Header) - header_done_);
      header_done_ += moved;
      if (header_done_ == sizeof(Header)) CheckReceived(message.header);
    } else {
      moved = ring_.Read(message.data + data_done_, message.header.bytes - data_done_);
      data_done_ += moved;
    }
    NextIfComplete(message);
    return moved > 0;
  }

  void CheckReceived(const Header& expected) const {
    if (Same(received_, expected)) return;
    throw Error(HCCL_E_PARA, "rank " + std::to_string(peer_) + " sent {" + Describe(received_) +
                                 "} where this rank expected {" + Describe(expected) +
                                 "}; all ranks must make the same calls in the same order");
  }

  void NextIfComplete(const Message& message) {
    if (header_done_ < sizeof(Header) || data_done_ < message.header.bytes) return;
    ++current_;
    header_done_ = 0;
    data_done_ = 0;
  }

  Direction direction_;
  uint32_t peer_;
  Ring ring_;
  std::vector<Message> messages_;
  size_t current_ = 0;
  size_t header_done_ = 0;
  size_t data_done_ = 0;
  Header received_{};
};

Communicator::Communicator(const Invitation& invitation, uint32_t num_ranks, uint32_t rank,
                           CommunicatorOptions options)
    : rank_(rank),
      num_ranks_(num_ranks),
      options_(std::move(options)),
      segment_(
          Segment::Join(invitation, {rank, num_ranks, options_.buffer_bytes, options_.connect_timeout})) {}

void Communicator::ThrowIfFailed() const {
  if (failure_.load() == HCCL_SUCCESS) return;
  throw Error(failure_.load(), "communicator " + name() + " has failed or was destroyed; make a new one");
}

void Communicator::Exchange(const Signature& signature, const std::vector<Send>& sends,
                            const std::vector<Receive>& receives) {
  std::vector<Lane> lanes;
  const auto lane = [&](Lane::Direction direction, uint32_t peer) -> Lane& {
    const size_t first = direction == Lane::Direction::kSend ? 0 : num_ranks_;
    return lanes[first + peer];
  };
  lanes.reserve(2 * size_t{num_ranks_});
  for (uint32_t peer = 0; peer < num_ranks_; ++peer) {
    lanes.emplace_back(Lane::Direction::kSend, peer, segment_->ring(rank_, peer));
  }
  for (uint32_t peer = 0; peer < num_ranks_; ++peer) {
    lanes.emplace_back(Lane::Direction::kReceive, peer, segment_->ring(peer, rank_));
  }
  for (const Send& send : sends) {
    auto* data =
        const_cast<std::byte*>(static_cast<const std::byte*>(send.data));  // a sending lane only reads it
    if (send.bytes > 0) lane(Lane::Direction::kSend, send.to).Add(signature, data, send.bytes);
  }
  for (const Receive& receive : receives) {
    auto* data = static_cast<std::byte*>(receive.data);
    if (receive.bytes > 0) lane(Lane::Direction::kReceive, receive.from).Add(signature, data, receive.bytes);
  }
  ThrowIfFailed();
  try {
    Move(lanes);
  } catch (const Error& error) {
    Fail(error.code(), RankState::kFailed);
    throw;
  }
}

void Communicator::Move(std::vector<Lane>& lanes) {
  Patience patience(options_.exchange_timeout);
  for (;;) {
    bool moved = false;
    bool done = true;
    for (Lane& lane : lanes) {
      moved |= lane.Advance();
      done &= lane.Done();
    }
    if (done) return;
    if (moved) {
      patience.Reset();
      continue;
    }
    patience.Pause();
    ThrowIfFailed();
    if (!patience.TimeToLook()) continue;
    ThrowIfPeerEnded(lanes);
    if (patience.Exhausted()) {
      const auto stuck =
          std::find_if(lanes.begin(), lanes.end(), [](const Lane& lane) { return !lane.Done(); });
      throw Error(HCCL_E_TIMEOUT, "rank " + std::to_string(rank_) + " of " + name() + " waited " +
                                      std::to_string(options_.exchange_timeout->count()) + " s for rank " +
                                      std::to_string(stuck->peer()) +
                                      "; find out what that rank does, or raise HCCL_EXEC_TIMEOUT");
    }
  }
}

void Communicator::ThrowIfPeerEnded(std::vector<Lane>& lanes) const {
  for (Lane& lane : lanes) {
    if (lane.Done() || lane.peer() == rank_) continue;
    const RankEntry& entry = segment_->entry(lane.peer());
    const RankState state = entry.state.load(std::memory_order_acquire);
    const bool there = state == RankState::kPresent && entry.process().Alive();
    // What a rank sent before it ended still counts.
    if (there || lane.Advance()) continue;
    const char* how = state == RankState::kFailed ? "has failed"
                      : state == RankState::kLeft ? "has destroyed its communicator"
                                                  : "has ended";
    throw Error(HCCL_E_REMOTE, "rank " + std::to_string(lane.peer()) + " (process " +
                                   std::to_string(entry.pid.load()) + ") " + how + " while rank " +
                                   std::to_string(rank_) + " of " + name() + " waited for it");
  }
}

void Communicator::Fail(HcclResult code, RankState state) {
  segment_->entry(rank_).state.store(state, std::memory_order_release);
  std::lock_guard lock(turn_mutex_);
  // The first failure is the cause of the others.
  HcclResult none = HCCL_SUCCESS;
  failure_.compare_exchange_strong(none, code);
  turn_changed_.notify_all();
}

/// The right to run once, as number `number_`. Unless it is used to the end, the communicator fails.
class Communicator::Turn {
 public:
  Turn(std::shared_ptr<Communicator> communicator, uint64_t number)
      : communicator_(std::move(communicator)), number_(number) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  ~Turn() {
    if (!finished_) communicator_->Fail(HCCL_E_INTERNAL, RankState::kFailed);
  }

  void Use(const std::function<void(Communicator&)>& operation) {
    Await();
    communicator_->ThrowIfFailed();
    operation(*communicator_);
    finished_ = true;
    std::lock_guard lock(communicator_->turn_mutex_);
    ++communicator_->turn_;
    communicator_->turn_changed_.notify_all();
  }

 private:
  void Await() {
    std::unique_lock lock(communicator_->turn_mutex_);
    communicator_->turn_changed_.wait(lock, [this] {
      return communicator_->turn_ == number_ || communicator_->AsyncError() != HCCL_SUCCESS;
    });
  }

  std::shared_ptr<Communicator> communicator_;
  uint64_t number_;
  bool finished_ = false;
};

void Communicator::Issue(std::function<void(Communicator&)> operation,
                         const std::function<void(std::function<void()>)>& enqueue) {
  ThrowIfFailed();
  std::lock_guard lock(issue_mutex_);
  const auto turn = std::make_shared<Turn>(shared_from_this(), next_number_++);
  enqueue([turn, operation = std::move(operation)] { turn->Use(operation); });
}

void Communicator::Abort() { Fail(HCCL_E_UNAVAIL, RankState::kLeft); }

}  // namespace ascend_emulator::hccl
