// SPDX-License-Identifier: Apache-2.0
//
// The least that a test needs: a failed expectation says where and what, and makes the program end with 1.
#pragma once

#include <cstdio>

inline int& Failures() {
  static int failures = 0;
  return failures;
}

inline void Expect(bool holds, const char* sentence, const char* where) {
  if (holds) return;
  std::fprintf(stderr, "%s: not true: %s\n", where, sentence);
  ++Failures();
}

inline int Verdict() { return Failures() == 0 ? 0 : 1; }
