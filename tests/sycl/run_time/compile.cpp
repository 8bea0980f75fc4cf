// Compiles all kernels that the launchers name, in one go, with the DPC++ front end that libsycl-jit.so holds
// (sycl_ext_oneapi_kernel_compiler), for the CPU device of Intel's OpenCL.
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "sycl/launch.h"

namespace batchinfer::run_time {
namespace {

namespace syclex = sycl::ext::oneapi::experimental;

std::vector<std::string>& names() {  // filled before main()
    static std::vector<std::string> all;
    return all;
}

using Executable = sycl::kernel_bundle<sycl::bundle_state::executable>;

Executable build() {
    std::string log;
    const std::vector<std::string> options = {"-std=c++20",
                                              "-O3",
                                              "-ffp-contract=off",
                                              "-I" BATCHINFER_ROOT "/csrc",
                                              "-I" BATCHINFER_ROOT "/csrc/include",
                                              "-I" BATCHINFER_ROOT "/tests/sycl/run_time"};
    try {
        auto source = syclex::create_kernel_bundle_from_source(queue().get_context(), syclex::source_language::sycl,
                                                               "#include \"entry.h\"\n");
        return syclex::build(source, syclex::properties{syclex::build_options{options}, syclex::save_log{&log},
                                                        syclex::registered_names{names()}});
    } catch (const sycl::exception& e) {
        throw std::runtime_error(std::string(e.what()) + "\n" + log);
    }
}

}  // namespace

std::string enrol(const std::type_info& kernel) {
    int status = 0;
    const std::unique_ptr<char, void (*)(void*)> type(abi::__cxa_demangle(kernel.name(), nullptr, nullptr, &status),
                                                      std::free);
    names().push_back("batchinfer::gpu::entry<" + std::string(type.get()) + ">");
    return names().back();
}

sycl::queue& queue() {
    static sycl::queue queue(sycl::cpu_selector_v, sycl::property::queue::in_order());
    return queue;
}

sycl::kernel compiled(const std::string& name) {
    static Executable executable = build();
    static std::map<std::string, sycl::kernel> kernels;
    const auto found = kernels.find(name);
    return found != kernels.end() ? found->second
                                  : kernels.emplace(name, executable.ext_oneapi_get_kernel(name)).first->second;
}

}  // namespace batchinfer::run_time
