#include "operators.h"

namespace pruneopd {

Positions::Positions(const int64_t* sizes, const int64_t* strides, int64_t axes) {
  for (int64_t axis = 0; axis < axes; ++axis) {
    count_ *= sizes[axis];
    if (sizes[axis] == 1) continue;
    if (!sizes_.empty() && strides_.back() == sizes[axis] * strides[axis]) {
      sizes_.back() *= sizes[axis];
      strides_.back() = strides[axis];
    } else {
      sizes_.push_back(sizes[axis]);
      strides_.push_back(strides[axis]);
    }
  }
}

}  // namespace pruneopd
