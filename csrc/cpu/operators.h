// The operators on the CPU: what the torch library (csrc/torch) and the NumPy module (csrc/host) both call.
#pragma once

#include <functional>
#include <string>

#include "../operators.h"

namespace pruneopd {

/// Runs body(begin, end) over disjoint ranges that cover [0, count), each at least `grain` long but the last.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

void compute(const ReliabilityArgs& args, const ParallelFor& parallel_for);
void compute(const ReliabilityFromTopkArgs& args, const ParallelFor& parallel_for);
void compute(const ReliabilityFromDriftArgs& args, const ParallelFor& parallel_for);
void compute(const TokenStatsArgs& args, const ParallelFor& parallel_for);
void compute(const TopkPolicyLossArgs& args, const ParallelFor& parallel_for);
void compute(const TopkForwardKlArgs& args, const ParallelFor& parallel_for);
void compute(const ReverseKlArgs& args, const ParallelFor& parallel_for);
void compute(const LogprobsBackwardArgs& args, const ParallelFor& parallel_for);
void compute(const ReverseKlBackwardArgs& args, const ParallelFor& parallel_for);

/// The row maxima of both tensors: what merely reading the logits costs, for the benchmarks.
struct RowMaxArgs {
  LogitsPair logits;
  int64_t positions;

  float *student_max, *teacher_max;
};

void compute(const RowMaxArgs& args, const ParallelFor& parallel_for);

/// The instruction sets this build has and this processor runs, best first: "avx512", "avx2", "portable".
std::vector<std::string> instruction_sets();
/// The one in use: the best, until another is chosen. Choosing one that is not listed returns false.
std::string instruction_set();
bool set_instruction_set(const std::string& name);

}  // namespace pruneopd
