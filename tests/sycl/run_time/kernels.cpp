// All kernels that the launchers name, compiled in one go when the first is launched, for Intel's OpenCL CPU device.
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "dpcpp.h"
#include "sycl/launch.h"

namespace batchinfer::run_time {
namespace {

std::vector<std::string>& names() {  // filled before main()
    static std::vector<std::string> all;
    return all;
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
    static Executable executable =
        compile(queue(), "#include \"entry.h\"\n", names(), {BATCHINFER_ROOT "/tests/sycl/run_time"});
    static std::map<std::string, sycl::kernel> kernels;
    const auto found = kernels.find(name);
    return found != kernels.end() ? found->second
                                  : kernels.emplace(name, executable.ext_oneapi_get_kernel(name)).first->second;
}

}  // namespace batchinfer::run_time
