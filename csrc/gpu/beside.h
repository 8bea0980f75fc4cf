// Two kernels beside one another: a second stream, which leaves the caller's and comes back to it. Of a step that is
// captured the two are branches.
#pragma once

#include "gpu/device.cuh"

namespace batchinfer::gpu {

// The one of this process, which has one device and launches from one thread.
class Beside {
  public:
    // What is launched on stream() from here on runs beside what goes to `main`, after all that went there before. Its
    // blocks are placed first.
    explicit Beside(gpuStream_t main) : main_(main) {
        check(gpuEventRecord(own().left, main), "attention");
        check(gpuStreamWaitEvent(own().stream, own().left), "attention");
    }
    gpuStream_t stream() const { return own().stream; }
    // What goes to the main stream from here on comes after both.
    void join() const {
        check(gpuEventRecord(own().back, own().stream), "attention");
        check(gpuStreamWaitEvent(main_, own().back), "attention");
    }

  private:
    struct Own {
        gpuStream_t stream;
        gpuEvent_t left, back;

        Own() {
            check(gpuStreamCreateUrgent(&stream), "attention");
            check(gpuEventCreateUntimed(&left), "attention");
            check(gpuEventCreateUntimed(&back), "attention");
        }
    };
    static const Own& own() {
        static const Own made;
        return made;
    }

    gpuStream_t main_;
};

}  // namespace batchinfer::gpu
