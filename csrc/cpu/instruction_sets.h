// Which instruction set the CPU operators use.
#pragma once

#include <string>
#include <vector>

namespace pruneopd {

/// The instruction sets that this build has and this processor runs, best first: "avx512", "avx2", "portable".
std::vector<std::string> instruction_sets();
/// The one in use: the best, until another is chosen. Choosing one that is not listed returns false.
const char* instruction_set();
bool set_instruction_set(const std::string& name);

}  // namespace pruneopd
