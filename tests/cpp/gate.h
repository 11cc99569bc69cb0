// SPDX-License-Identifier: Apache-2.0
//
// A gate holds a task back until the test opens it, so that no test has to guess how long something takes.
#pragma once

#include <functional>
#include <future>
#include <memory>

class Gate {
 public:
  // Opens what still waits, so that a test that fails does not leave a stream behind for ever.
  ~Gate() { Open(); }

  void Open() {
    if (!open_) promise_.set_value();
    open_ = true;
  }

  // A task that returns when the gate is open.
  std::function<void()> Task() const {
    return [opened = opened_] { opened.wait(); };
  }

 private:
  std::promise<void> promise_;
  std::shared_future<void> opened_ = promise_.get_future().share();
  bool open_ = false;
};
