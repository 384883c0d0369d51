// The choice among the compiled kernel variants.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace pyattn {

// The variant in use: the best one available, or the one that the environment variable PYATTN_ISA names. Read once.
// Throws std::runtime_error, naming what there is, if that name is unknown, not compiled in or not supported here.
const Kernels& kernels();

std::vector<std::string> compiled_isas();   // best first
std::vector<std::string> available_isas();  // those that this machine can run, best first

}  // namespace pyattn
