// SPDX-License-Identifier: Apache-2.0
//
// Communicators between forked processes: what they exchange, and how they end when one of them does.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "hccl/collectives.h"

using namespace ascend_emulator::hccl;
using std::chrono::seconds;

namespace {

constexpr int kNotWhatWasExpected = 99;

std::shared_ptr<Communicator> Join(const Invitation& invitation, uint32_t num_ranks, uint32_t rank,
                                   std::optional<seconds> exchange_timeout = seconds(60)) {
  // One byte asks for the smallest rings, so that messages are longer than a ring.
  const CommunicatorOptions options{"test", 1, seconds(20), exchange_timeout};
  return std::make_shared<Communicator>(invitation, num_ranks, rank, options);
}

/// Runs `operation` as an issued operation, on this thread.
void Do(Communicator& comm, const std::function<void(Communicator&)>& operation) {
  comm.Issue(operation, [](const std::function<void()>& task) { task(); });
}

/// The code with which `operation` ends.
HcclResult CodeOf(const std::function<void()>& operation) {
  try {
    operation();
  } catch (const Error& error) {
    std::fprintf(stderr, "as expected: %s\n", error.what());
    return error.code();
  }
  return HCCL_SUCCESS;
}

/// Forks `num_ranks` processes that run `body` and returns how they ended: the exit status, or -signal.
std::vector<int> RunRanks(uint32_t num_ranks,
                          const std::function<int(const Invitation&, uint32_t rank)>& body) {
  const Invitation invitation = Invitation::Found();
  std::vector<pid_t> processes;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    const pid_t process = fork();
    if (process == 0) {
      int status = kNotWhatWasExpected;
      try {
        status = body(invitation, rank);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %u: %s\n", rank, error.what());
      }
      _exit(status);
    }
    processes.push_back(process);
  }
  std::vector<int> ends;
  for (const pid_t process : processes) {
    int status = 0;
    waitpid(process, &status, 0);
    ends.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
  }
  return ends;
}

std::vector<int64_t> Numbers(size_t count, int64_t first) {
  std::vector<int64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

/// Three ranks, messages of several rings' length, every collective once on one communicator.
int EveryCollective(const Invitation& invitation, uint32_t rank) {
  constexpr uint32_t kRanks = 3;
  const auto comm = Join(invitation, kRanks, rank);
  for (const size_t count : {size_t{1}, size_t{5}, size_t{100'001}}) {
    const Reduction sum{HCCL_DATA_TYPE_INT64, HCCL_REDUCE_SUM};
    const std::vector<int64_t> mine = Numbers(count, 1000 * rank);

    std::vector<int64_t> total = mine;
    Do(*comm, [&](Communicator& c) { AllReduce(c, total.data(), total.data(), count, sum); });
    for (size_t i = 0; i < count; ++i) {
      Expect(total[i] == 3000 + 3 * static_cast<int64_t>(i), "AllReduce: the sum over ranks, in place");
    }

    std::vector<int64_t> gathered(kRanks * count);
    Do(*comm, [&](Communicator& c) {
      AllGather(c, mine.data(), gathered.data(), EvenBlocks(kRanks, count), HCCL_DATA_TYPE_INT64);
    });
    for (size_t i = 0; i < gathered.size(); ++i) {
      const auto expected = static_cast<int64_t>(1000 * (i / count) + i % count);
      Expect(gathered[i] == expected, "AllGather: every rank's numbers in the order of ranks");
    }

    std::vector<int64_t> part(count);
    Do(*comm, [&](Communicator& c) {
      ReduceScatter(c, gathered.data(), EvenBlocks(kRanks, count), part.data(), sum);
    });
    for (size_t i = 0; i < count; ++i) Expect(part[i] == 3 * mine[i], "ReduceScatter: three times my block");

    std::vector<int64_t> swapped(kRanks * count);
    Do(*comm, [&](Communicator& c) {
      const std::vector<Block> blocks = EvenBlocks(kRanks, count);
      AllToAll(c, gathered.data(), blocks, HCCL_DATA_TYPE_INT64, swapped.data(), blocks);
    });
    for (size_t i = 0; i < swapped.size(); ++i) {
      Expect(swapped[i] == mine[i % count], "AllToAll: my block from every rank");
    }

    std::vector<int64_t> from_last = mine;
    Do(*comm, [&](Communicator& c) { Broadcast(c, from_last.data(), count, HCCL_DATA_TYPE_INT64, 2); });
    Expect(from_last == Numbers(count, 2000), "Broadcast: the last rank's numbers");

    Do(*comm,
       [&](Communicator& c) { Scatter(c, gathered.data(), part.data(), count, HCCL_DATA_TYPE_INT64, 1); });
    Expect(part == mine, "Scatter: my block of rank 1's buffer");

    std::vector<int64_t> at_root(count, -1);
    Do(*comm, [&](Communicator& c) { ReduceTo(c, mine.data(), at_root.data(), count, sum, 1); });
    Expect(rank == 1 ? at_root == total : at_root[0] == -1, "ReduceTo: the sum on the root only");
    Do(*comm, Barrier);
  }
  return 0;
}

/// Both ranks send more than a ring holds before either receives: only an exchange of both at once can end.
int SendBothWays(const Invitation& invitation, uint32_t rank) {
  const auto comm = Join(invitation, 2, rank);
  const std::vector<int64_t> mine = Numbers(100'000, rank);
  std::vector<int64_t> theirs(mine.size());
  const size_t bytes = mine.size() * sizeof mine[0];
  Do(*comm, [&](Communicator& c) {
    c.Exchange({HCCL_CMD_SEND, HCCL_DATA_TYPE_UINT8, 0}, {{1 - rank, mine.data(), bytes}},
               {{1 - rank, theirs.data(), bytes}});
  });
  Expect(theirs == Numbers(mine.size(), 1 - rank), "Exchange: the other rank's numbers");
  return 0;
}

/// Rank 1 is killed; rank 0 waits for it, and rank 2 waits for rank 0 alone, which lives but fails.
int KilledPeer(const Invitation& invitation, uint32_t rank) {
  const auto comm = Join(invitation, 3, rank);
  if (rank == 1) raise(SIGKILL);
  const uint32_t root = rank == 0 ? 1 : 0;
  const auto receive = [&](Communicator& c) {
    int64_t value = 0;
    Broadcast(c, &value, 1, HCCL_DATA_TYPE_INT64, root);
  };
  const HcclResult code = CodeOf([&] { Do(*comm, receive); });
  Expect(comm->AsyncError() == code, "AsyncError: the failure is remembered");
  Expect(CodeOf([&] { Do(*comm, receive); }) == code, "Issue: a failed communicator refuses");
  return code;
}

int KilledBeforeJoining(const Invitation& invitation, uint32_t rank) {
  if (rank == 1) raise(SIGKILL);
  const CommunicatorOptions options{"test", 1, seconds(1), seconds(1)};
  return CodeOf([&] { Communicator(invitation, 2, rank, options); });
}

int SilentPeer(const Invitation& invitation, uint32_t rank) {
  const auto comm = Join(invitation, 2, rank, seconds(1));
  if (rank == 1) std::this_thread::sleep_for(seconds(3));
  return rank == 1 ? 0 : CodeOf([&] { Do(*comm, Barrier); });
}

int DifferentCalls(const Invitation& invitation, uint32_t rank) {
  const auto comm = Join(invitation, 2, rank);
  int64_t value = 0;
  const Reduction op{HCCL_DATA_TYPE_INT64, rank == 0 ? HCCL_REDUCE_SUM : HCCL_REDUCE_MAX};
  const HcclResult code =
      CodeOf([&] { Do(*comm, [&](Communicator& c) { AllReduce(c, &value, &value, 1, op); }); });
  return code;
}

int DroppedOperation(const Invitation& invitation, uint32_t rank) {
  const auto comm = Join(invitation, 2, rank);
  if (rank == 1) {
    comm->Issue(Barrier, [](const std::function<void()>&) {});
    return comm->AsyncError();
  }
  return CodeOf([&] { Do(*comm, Barrier); });
}

int DifferentSizes(const Invitation& invitation, uint32_t rank) {
  const CommunicatorOptions options{"test", 1, seconds(1), seconds(1)};
  const HcclResult code = CodeOf([&] { Communicator(invitation, 2 + rank, rank, options); });
  return code == HCCL_E_PARA || code == HCCL_E_TIMEOUT ? 0 : code;
}

void ExpectEnds(const std::vector<int>& expected,
                const std::function<int(const Invitation&, uint32_t)>& body) {
  const std::vector<int> ends = RunRanks(static_cast<uint32_t>(expected.size()), body);
  std::string sentence = "the ranks to end with other codes than";
  for (const int end : ends) sentence += " " + std::to_string(end);
  Expect(ends == expected, sentence);
}

}  // namespace

int main() {
  return RunAll({
      {"every collective, also with messages longer than a ring",
       [] { ExpectEnds({0, 0, 0}, EveryCollective); }},
      {"both ranks send before either receives", [] { ExpectEnds({0, 0}, SendBothWays); }},
      {"a killed rank fails those that wait for it, and those that wait for them",
       [] { ExpectEnds({HCCL_E_REMOTE, -SIGKILL, HCCL_E_REMOTE}, KilledPeer); }},
      {"a rank that never joins", [] { ExpectEnds({HCCL_E_TIMEOUT, -SIGKILL}, KilledBeforeJoining); }},
      {"a silent rank", [] { ExpectEnds({HCCL_E_TIMEOUT, 0}, SilentPeer); }},
      {"ranks that make different calls", [] { ExpectEnds({HCCL_E_PARA, HCCL_E_PARA}, DifferentCalls); }},
      {"an operation that is dropped",
       [] { ExpectEnds({HCCL_E_REMOTE, HCCL_E_INTERNAL}, DroppedOperation); }},
      {"ranks that differ on how many they are", [] { ExpectEnds({0, 0}, DifferentSizes); }},
  });
}
