// SPDX-License-Identifier: Apache-2.0
//
// Founding and joining the shared memory of a communicator; see segment.h.
#include "hccl/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <utility>

#include "hccl/error.h"
#include "hccl/patience.h"

namespace ascend_emulator::hccl {
namespace {

constexpr uint64_t kMagic = 0x31304c434348454e;  // "NEHCCL01", the version of this layout
constexpr size_t kLargestRing = size_t{1} << 20;
constexpr size_t kSmallestRing = size_t{64} << 10;

[[noreturn]] void ThrowErrno(const std::string& what) {
  throw Error(HCCL_E_SYSCALL, what + ": " + std::strerror(errno));
}

/// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }
  int number() const { return number_; }

 private:
  int number_;
};

/// The files this process founded and whose ranks have not all arrived.
class OpenInvitations {
 public:
  void Keep(const Invitation& invitation, Descriptor file) {
    std::lock_guard lock(mutex_);
    files_.emplace(invitation.token, std::move(file));
  }

  void Close(const Invitation& invitation) {
    std::lock_guard lock(mutex_);
    files_.erase(invitation.token);
  }

 private:
  std::mutex mutex_;
  std::map<std::array<uint64_t, 2>, Descriptor> files_;
};

OpenInvitations& Founded() {
  static OpenInvitations founded;
  return founded;
}

std::array<char, 65> HostName() {
  std::array<char, 65> name{};
  gethostname(name.data(), name.size() - 1);
  return name;
}

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

/// When all ranks have the file mapped, or the founder gave up, nobody may come any more.
class ClosedAtEnd {
 public:
  explicit ClosedAtEnd(const Invitation& invitation) : invitation_(invitation) {}
  ~ClosedAtEnd() {
    if (invitation_.founder.pid == getpid()) Founded().Close(invitation_);
  }
  ClosedAtEnd(const ClosedAtEnd&) = delete;
  ClosedAtEnd& operator=(const ClosedAtEnd&) = delete;

 private:
  const Invitation& invitation_;
};

Descriptor Open(const Invitation& invitation) {
  if (invitation.magic != kMagic) {
    throw Error(HCCL_E_PARA, "the root info was not made by this version of the emulated HCCL");
  }
  const std::array<char, 65> here = HostName();
  if (here != invitation.host) {
    throw Error(HCCL_E_NOT_SUPPORT, std::string("the root info comes from host ") + invitation.host.data() +
                                        " and this is " + here.data() +
                                        "; the emulated HCCL joins processes of one host only");
  }
  const std::string path =
      "/proc/" + std::to_string(invitation.founder.pid) + "/fd/" + std::to_string(invitation.descriptor);
  const int number = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (number >= 0) return Descriptor(number);
  if (!invitation.founder.Alive()) {
    throw Error(HCCL_E_REMOTE, "process " + std::to_string(invitation.founder.pid) +
                                   ", which made the root info, has ended; start all ranks again");
  }
  throw Error(HCCL_E_OPEN_FILE_FAILURE,
              "cannot open " + path + ": " + std::strerror(errno) +
                  "; all ranks must run as one user in one PID namespace and join while rank "
                  "0 waits (HCCL_CONNECT_TIMEOUT)");
}

}  // namespace

/// The head of the shared memory.
struct Segment::Directory {
  std::array<uint64_t, 2> token;
  std::atomic<uint32_t> num_ranks;   // 0 until the first rank has said how many there are
  std::atomic<uint64_t> ring_bytes;  // likewise
  std::array<RankEntry, kMaxRanks> ranks;
};

Invitation Invitation::Found() {
  Descriptor file(memfd_create("ascend_emulator_hccl", MFD_CLOEXEC));
  if (file.number() < 0) ThrowErrno("memfd_create");
  if (ftruncate(file.number(), static_cast<off_t>(Segment::DirectoryBytes())) != 0) ThrowErrno("ftruncate");
  std::random_device random;
  Invitation invitation{};
  invitation.magic = kMagic;
  invitation.founder = ProcessIdentity::Self();
  invitation.descriptor = file.number();
  invitation.host = HostName();
  for (uint64_t& word : invitation.token) word = (uint64_t{random()} << 32) | random();
  const auto size = static_cast<ssize_t>(sizeof invitation.token);
  if (pwrite(file.number(), invitation.token.data(), sizeof invitation.token, 0) != size)
    ThrowErrno("pwrite");
  Founded().Keep(invitation, std::move(file));
  return invitation;
}

size_t Segment::DirectoryBytes() { return RoundUp(sizeof(Directory), 4096); }

std::unique_ptr<Segment> Segment::Join(const Invitation& invitation, const JoinRequest& request) {
  if (request.num_ranks == 0 || request.num_ranks > kMaxRanks) {
    throw Error(HCCL_E_PARA, "a communicator of " + std::to_string(request.num_ranks) +
                                 " ranks was asked for; 1 to " + std::to_string(kMaxRanks) + " are possible");
  }
  if (request.rank >= request.num_ranks) {
    throw Error(HCCL_E_PARA, "rank " + std::to_string(request.rank) + " was asked for in a communicator of " +
                                 std::to_string(request.num_ranks) + " ranks; ranks count from 0");
  }
  const Descriptor file = Open(invitation);
  const ClosedAtEnd founded(invitation);
  std::unique_ptr<Segment> segment(new Segment(request));
  segment->Map(file.number(), DirectoryBytes());
  if (segment->directory().token != invitation.token) {
    throw Error(HCCL_E_REMOTE,
                "the communicator of this root info is gone; every root info serves one communicator");
  }
  segment->AgreeOnShape(file.number(), request.buffer_bytes);
  segment->Claim();
  segment->AwaitAll(request.timeout);
  return segment;
}

Segment::Segment(const JoinRequest& request) : rank_(request.rank), num_ranks_(request.num_ranks) {}

Segment::~Segment() {
  if (base_ == nullptr) return;
  if (claimed_ && entry(rank_).state.load() != RankState::kFailed) {
    entry(rank_).state.store(joined_ ? RankState::kLeft : RankState::kFailed, std::memory_order_release);
  }
  munmap(base_, mapped_bytes_);
}

RankEntry& Segment::entry(uint32_t rank) const { return directory().ranks.at(rank); }

Ring Segment::ring(uint32_t from, uint32_t to) const {
  const size_t stride = sizeof(RingCursors) + ring_bytes_;
  std::byte* start = base_ + DirectoryBytes() + (size_t{from} * num_ranks_ + to) * stride;
  return {reinterpret_cast<RingCursors*>(start), start + sizeof(RingCursors), ring_bytes_};
}

Segment::Directory& Segment::directory() const { return *reinterpret_cast<Directory*>(base_); }

void Segment::Map(int descriptor, size_t bytes) {
  if (base_ != nullptr) munmap(base_, mapped_bytes_);
  base_ = nullptr;
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (address == MAP_FAILED) ThrowErrno("mapping " + std::to_string(bytes) + " shared bytes");
  base_ = static_cast<std::byte*>(address);
  mapped_bytes_ = bytes;
}

void Segment::AgreeOnShape(int descriptor, size_t buffer_bytes) {
  uint32_t num_ranks = 0;
  if (!directory().num_ranks.compare_exchange_strong(num_ranks, num_ranks_) && num_ranks != num_ranks_) {
    throw Error(HCCL_E_PARA, "rank " + std::to_string(rank_) + " asked for " + std::to_string(num_ranks_) +
                                 " ranks where another rank asked for " + std::to_string(num_ranks));
  }
  const size_t num_rings = size_t{num_ranks_} * num_ranks_;
  const size_t wanted = std::clamp(buffer_bytes / num_rings, kSmallestRing, kLargestRing) / 64 * 64;
  uint64_t agreed = 0;
  ring_bytes_ = directory().ring_bytes.compare_exchange_strong(agreed, wanted) ? wanted : agreed;
  // Every rank asks for the same size, so it does not matter which comes first. Pages are there once touched.
  const size_t total = DirectoryBytes() + num_rings * (sizeof(RingCursors) + ring_bytes_);
  if (ftruncate(descriptor, static_cast<off_t>(total)) != 0) ThrowErrno("ftruncate");
  Map(descriptor, total);
}

void Segment::Claim() {
  RankState expected = RankState::kAbsent;
  if (!entry(rank_).state.compare_exchange_strong(expected, RankState::kArriving)) {
    throw Error(HCCL_E_PARA, "rank " + std::to_string(rank_) + " joined this communicator twice");
  }
  claimed_ = true;
  const ProcessIdentity self = ProcessIdentity::Self();
  entry(rank_).pid.store(self.pid);
  entry(rank_).start_ticks.store(self.start_ticks);
  entry(rank_).state.store(RankState::kPresent, std::memory_order_release);
}

void Segment::AwaitAll(std::chrono::seconds timeout) {
  Patience patience(timeout);
  for (;;) {
    const std::vector<uint32_t> missing = Missing();
    if (missing.empty()) break;
    patience.Pause();
    if (patience.TimeToLook()) ThrowIfSomeoneEnded();
    if (patience.Exhausted()) {
      throw Error(HCCL_E_TIMEOUT, "rank " + std::to_string(missing.front()) + " of " +
                                      std::to_string(num_ranks_) + " did not join within " +
                                      std::to_string(timeout.count()) + " s (HCCL_CONNECT_TIMEOUT)");
    }
  }
  joined_ = true;
}

std::vector<uint32_t> Segment::Missing() const {
  std::vector<uint32_t> missing;
  for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
    const RankState state = entry(rank).state.load(std::memory_order_acquire);
    // A rank that has left was here: it may be done with all its work before this rank looks.
    if (state == RankState::kAbsent || state == RankState::kArriving) missing.push_back(rank);
  }
  return missing;
}

void Segment::ThrowIfSomeoneEnded() const {
  for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
    const RankState state = entry(rank).state.load(std::memory_order_acquire);
    const bool dead = state == RankState::kPresent && !entry(rank).process().Alive();
    if (dead || state == RankState::kFailed) {
      throw Error(HCCL_E_REMOTE, "rank " + std::to_string(rank) + " (process " +
                                     std::to_string(entry(rank).pid.load()) +
                                     ") ended while the others joined");
    }
  }
}

}  // namespace ascend_emulator::hccl
