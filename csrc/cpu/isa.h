// The choice among the instruction sets compiled into this module, at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace batchinfer {

// Names of the instruction sets compiled into this module, best first.
std::vector<std::string> compiled_isas();

// Those of them that this CPU has, best first.
std::vector<std::string> usable_isas();

// The kernels of the named instruction set; "" means $BATCHINFER_ISA, or the best one where that is unset. Throws
// std::invalid_argument naming what can be asked for if the CPU or the build lacks it.
const KernelTable& choose_kernels(const std::string& isa);

}  // namespace batchinfer
