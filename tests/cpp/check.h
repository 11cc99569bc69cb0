// SPDX-License-Identifier: Apache-2.0
//
// The little that a test program needs: named cases, a check that says what it expected, and an exit status.
#pragma once

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/error.h"

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void Expect(bool holds, const std::string& what) {
  if (!holds) throw Failed("expected: " + what);
}

// Expects `action` to throw an Error with `fault`.
inline void ExpectFault(ascend_emulator::Fault fault, const std::string& what,
                        const std::function<void()>& action) {
  try {
    action();
  } catch (const ascend_emulator::Error& error) {
    Expect(error.fault() == fault, what + ", and got: " + error.what());
    return;
  }
  throw Failed("expected: " + what + ", and nothing was thrown");
}

struct Case {
  const char* name;
  std::function<void()> run;
};

// Runs all cases; the exit status of the program.
inline int RunAll(const std::vector<Case>& cases) {
  int failures = 0;
  for (const Case& test : cases) {
    try {
      test.run();
      std::printf("ok    %s\n", test.name);
    } catch (const std::exception& error) {
      std::printf("FAIL  %s: %s\n", test.name, error.what());
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
