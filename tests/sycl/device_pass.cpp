// The launchers of csrc/sycl as DPC++'s device pass sees them: device_pass SOURCE ... compiles each, lambdas included,
// with the front end in libsycl-jit.so. With SYCL_DUMP_IMAGES=1 the modules stay in the current folder, as SPIR-V.
#include <exception>
#include <iostream>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

#include "dpcpp.h"

int main(int count, char** sources) {
    sycl::queue queue(sycl::cpu_selector_v);
    for (int i = 1; i < count; ++i) {
        try {
            batchinfer::run_time::compile(queue, std::string("#include \"") + sources[i] + "\"\n", {}, {});
        } catch (const std::exception& e) {
            std::cerr << sources[i] << ": " << e.what() << '\n';
            return 1;
        }
    }
}
