// The compiler: DPC++'s front end as a library (sycl_ext_oneapi_kernel_compiler).
#pragma once

#include <stdexcept>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace batchinfer::run_time {

using Executable = sycl::kernel_bundle<sycl::bundle_state::executable>;

// Kernels for the queue's device. `names`: instances of templates that are to be there; `folders`: of headers, before
// those of csrc. Raises std::runtime_error with the compiler's messages.
inline Executable compile(const sycl::queue& queue, const std::string& source, const std::vector<std::string>& names,
                          const std::vector<std::string>& folders) {
    namespace syclex = sycl::ext::oneapi::experimental;
    std::vector<std::string> options = {"-std=c++20", "-O3",    "-ffp-contract=off", "-fsycl-device-code-split=off",
                                        "-Wall",      "-Werror"};
    for (const std::string& folder : folders) {
        options.push_back("-I" + folder);
    }
    options.insert(options.end(), {"-I" BATCHINFER_ROOT "/csrc", "-I" BATCHINFER_ROOT "/csrc/include"});
    std::string log;
    try {
        auto text =
            syclex::create_kernel_bundle_from_source(queue.get_context(), syclex::source_language::sycl, source);
        return syclex::build(text, syclex::properties{syclex::build_options{options}, syclex::save_log{&log},
                                                      syclex::registered_names{names}});
    } catch (const sycl::exception& e) {
        throw std::runtime_error(std::string(e.what()) + "\n" + log);
    }
}

}  // namespace batchinfer::run_time
