#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace batchinfer {

// Defined in kernels/table.cpp, once per instruction set. CMake defines BATCHINFER_HAVE_* for those it compiled.
namespace avx512bf16 {
extern const KernelTable table;
}
namespace avx512vnni {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace generic {
extern const KernelTable table;
}

namespace {

[[maybe_unused]] bool cpu_has_avx2() {
#if defined(__x86_64__)
    // Every CPU with these three has F16C too, which not every compiler can ask about.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

[[maybe_unused]] bool cpu_has_avx512() {
#if defined(__x86_64__)
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

[[maybe_unused]] bool cpu_has_avx512vnni() {
#if defined(__x86_64__)
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

[[maybe_unused]] bool cpu_has_avx512bf16() {
#if defined(__x86_64__)
    return cpu_has_avx512vnni() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

struct Isa {
    const KernelTable* table;
    bool (*usable)();
};

const std::vector<Isa>& isas() {
    static const std::vector<Isa> best_first = {
#ifdef BATCHINFER_HAVE_avx512bf16
        {&avx512bf16::table, cpu_has_avx512bf16},
#endif
#ifdef BATCHINFER_HAVE_avx512vnni
        {&avx512vnni::table, cpu_has_avx512vnni},
#endif
#ifdef BATCHINFER_HAVE_avx512
        {&avx512::table, cpu_has_avx512},
#endif
#ifdef BATCHINFER_HAVE_avx2
        {&avx2::table, cpu_has_avx2},
#endif
        {&generic::table, [] { return true; }},
    };
    return best_first;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names)
        text += (text.empty() ? "" : ", ") + name;
    return text;
}

}  // namespace

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        names.push_back(isa.table->isa);
    return names;
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) {
        if (isa.usable()) names.push_back(isa.table->isa);
    }
    return names;
}

const KernelTable& choose_kernels(const std::string& asked) {
    const char* forced = std::getenv("BATCHINFER_ISA");
    const std::string name = asked.empty() && forced ? forced : asked;
    for (const Isa& isa : isas()) {
        if (isa.usable() && (name.empty() || name == isa.table->isa)) return *isa.table;
    }
    throw std::invalid_argument("instruction set '" + name + "' (" + (asked.empty() ? "BATCHINFER_ISA" : "isa") +
                                ") cannot be used: this build has " + joined(compiled_isas()) +
                                ", and this CPU can run " + joined(usable_isas()));
}

}  // namespace batchinfer
