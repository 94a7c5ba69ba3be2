// Every operator. Adding one here registers it for torch on the CPU and on GPUs, for NumPy, and with the emulator.
#pragma once

#include "operators/logprobs_backward.h"
#include "operators/reliability.h"
#include "operators/reliability_from_drift.h"
#include "operators/reliability_from_topk.h"
#include "operators/reverse_kl.h"
#include "operators/row_stats.h"
#include "operators/token_stats.h"

namespace pruneopd {

/// Calls visit.operator()<Args>() for each operator.
template <class Visit>
void for_each_operator(const Visit& visit) {
  visit.template operator()<ReliabilityArgs>();
  visit.template operator()<ReliabilityFromTopkArgs>();
  visit.template operator()<ReliabilityFromDriftArgs>();
  visit.template operator()<TokenStatsArgs>();
  visit.template operator()<OpdScoresArgs>();
  visit.template operator()<RowStatsArgs>();
  visit.template operator()<ReverseKlArgs>();
  visit.template operator()<LogprobsBackwardArgs>();
  visit.template operator()<ReverseKlBackwardArgs>();
}

}  // namespace pruneopd
