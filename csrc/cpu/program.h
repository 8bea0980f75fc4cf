// Calls of a step's ops, kept to be repeated without Python between them.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace batchinfer {

// What a call points at must stay where it is: the contents may change, sizes and addresses may not.
class Program {
  public:
    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

    // What a call throws ends the run.
    void run() const {
        for (const auto& call : calls_)
            call();
    }

    size_t size() const { return calls_.size(); }

  private:
    std::vector<std::function<void()>> calls_;
};

}  // namespace batchinfer
