// What crosses the C ABI. The Python side of each record is in the module beside its kernel.
#pragma once

#include <cstdint>

#define FOVEATE_EXPORT extern "C" __attribute__((visibility("default")))

namespace foveate {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// A tensor (batch, head, row, dim): strides in elements, those of the last axis are 1.
struct Tensor {
  const void* data;
  int64_t batch, head, row;
};

enum Status : int32_t { kDone = 0, kNoMemory = 1, kOtherSources = 2 };

// Every kernel is `int32_t foveate_NAME(const Record*, int64_t size)`, `size` being what the caller
// takes for sizeof(Record); `run(record)` returns a Status. Nothing is thrown across the C ABI.
template <class Record, class Run>
int32_t guarded(const Record* record, int64_t size, Run&& run) {
  if (size != sizeof(Record)) return kOtherSources;
  try {
    return run(*record);
  } catch (...) {
    return kNoMemory;
  }
}

}  // namespace foveate
