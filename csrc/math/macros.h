// The formulas of this folder are shared by every compiled implementation: plain C++, no torch, no allocation.
//
// They are forced inline: a source compiled for a newer instruction set must never leave behind an out-of-line copy
// that the linker could pick for everybody.
#pragma once

#ifdef __CUDACC__
#define PRUNEOPD_FORMULA __host__ __device__ __forceinline__
#else
#define PRUNEOPD_FORMULA inline __attribute__((always_inline))
#endif
