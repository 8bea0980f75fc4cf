// The choice of the kernels. $BATCHINFER_EXPECTED_ISA: what this CPU is known to take.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu/isa.h"

using namespace batchinfer;

int main() {
    unsetenv("BATCHINFER_ISA");
    const std::vector<std::string> compiled = compiled_isas(), usable = usable_isas();
    CHECK(!usable.empty() && usable.back() == compiled.back());  // the baseline
    CHECK(choose_kernels("").isa == usable.front());
    if (const char* expected = std::getenv("BATCHINFER_EXPECTED_ISA")) CHECK(usable.front() == expected);
    for (const std::string& isa : compiled) {
        if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
            CHECK_THROWS(choose_kernels(isa), std::invalid_argument);
            continue;
        }
        CHECK(choose_kernels(isa).isa == isa);
        setenv("BATCHINFER_ISA", isa.c_str(), 1);
        CHECK(choose_kernels("").isa == isa);
    }
    setenv("BATCHINFER_ISA", "mmx", 1);
    CHECK_THROWS(choose_kernels(""), std::invalid_argument);
}
