#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace batchinfer {

// Defined in kernels/table.cpp, once per instruction set. CMake defines BATCHINFER_HAVE_* for those it compiled.
namespace amx {
extern const KernelTable table;
}
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
namespace neonbf16 {
extern const KernelTable table;
}
namespace neondotprod {
extern const KernelTable table;
}
namespace neon {
extern const KernelTable table;
}

namespace {

[[maybe_unused]] bool cpu_has_baseline() {
    return true;
}

#if defined(__x86_64__)
bool cpu_has_avx2() {
    // Every CPU with these three has F16C too, which not every compiler can ask about.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool cpu_has_avx512vnni() {
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
}

bool cpu_has_avx512bf16() {
    return cpu_has_avx512vnni() && __builtin_cpu_supports("avx512bf16");
}

// Linux keeps the 8 KiB of tile registers from a process that has not asked for them (kernel 5.16 and later), once for
// all its threads: https://docs.kernel.org/arch/x86/xstate.html
[[maybe_unused]] bool cpu_has_amx() {
    static const bool granted = [] {
        unsigned a, b, c, d;
        if (!cpu_has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1, int8 = d >> 25 & 1;
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return bf16 && tiles && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
}
#elif defined(__aarch64__)
// Bits of Linux's <asm/hwcap.h>, which older systems do not have all of.
bool cpu_has_neondotprod() {
    return getauxval(AT_HWCAP) >> 20 & 1;
}

[[maybe_unused]] bool cpu_has_neonbf16() {
    const unsigned long more = getauxval(AT_HWCAP2);
    return cpu_has_neondotprod() && more >> 13 & 1 && more >> 14 & 1;  // I8MM, BF16
}
#endif

struct Isa {
    const KernelTable* table;
    bool (*usable)();
};

const std::vector<Isa>& isas() {
    static const std::vector<Isa> best_first = {
#ifdef BATCHINFER_HAVE_amx
        {&amx::table, cpu_has_amx},
#endif
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
#ifdef BATCHINFER_HAVE_generic
        {&generic::table, cpu_has_baseline},
#endif
#ifdef BATCHINFER_HAVE_neonbf16
        {&neonbf16::table, cpu_has_neonbf16},
#endif
#ifdef BATCHINFER_HAVE_neondotprod
        {&neondotprod::table, cpu_has_neondotprod},
#endif
#ifdef BATCHINFER_HAVE_neon
        {&neon::table, cpu_has_baseline},
#endif
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
