// What losses over candidates read of a position and save of it.
#pragma once

#include "../math/loss.h"
#include "position.cuh"

namespace pruneopd::cuda {

/// log p of an id >= 0, NaN for one that does not exist.
template <class T>
__device__ __forceinline__ double candidate_logprob(const Rows<1>& args, const PositionMemory<1>& memory, int64_t id) {
  const auto row = make_row<T>(memory.logits[0], args.logits[0].type, args.vocab_size);
  if (id >= row.vocab_size) return NAN;
  return memory.summaries.rows[0].logprob(row.logit(static_cast<int>(id)), args.temperatures[0]);
}

__device__ __forceinline__ void write_state(float* states, int n, float reference, float mass) {
  float* const state = states + n * kRowState;
  state[0] = reference;
  state[1] = mass;
}

__device__ __forceinline__ void write_state(float* states, int n, const Rows<1>& args,
                                            const PositionMemory<1>& memory) {
  const RowState state(memory.summary(args, 0));
  write_state(states, n, state.reference, state.mass);
}

}  // namespace pruneopd::cuda
