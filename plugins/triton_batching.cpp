// Custom batching for TensorRT in Triton: decides which requests may share a batch.
//
// An engine has memory for batches of small images and for single large ones, not for batches of
// large ones. Triton forms batches of whatever has one size; the TensorRT backend loads this library
// as its `batchstrategy.so`, and Triton then asks it about each request before it adds it to a batch.
// SPDX-License-Identifier: GPL-3.0-or-later
#include <cstdint>

// The part of Triton's C interface that is used (tritonbackend.h, stable since 1.0). The server
// that loads this library provides it.
struct TRITONSERVER_Error;
struct TRITONBACKEND_Batcher;
struct TRITONBACKEND_Input;
struct TRITONBACKEND_Model;
struct TRITONBACKEND_Request;

extern "C" {

TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(TRITONBACKEND_Request* request,
                                                      uint32_t index, TRITONBACKEND_Input** input);
TRITONSERVER_Error* TRITONBACKEND_InputProperties(TRITONBACKEND_Input* input, const char** name,
                                                  uint32_t* type, const int64_t** shape,
                                                  uint32_t* rank, uint64_t* bytes,
                                                  uint32_t* buffers);

namespace {

// Largest height and width in a batch: the first profile of every engine ends there.
constexpr int64_t kLargestEdge = FLOWNET2_BATCH_EDGE;

// True while the batch that is being formed is empty. One thread forms all batches of a
// model, one after the other: the configuration's queue limits see to that, since Triton prefetches
// batches only for queues without limits and timeouts. Triton offers requests to a batch after its
// end too, while the batch waits for the GPU.
thread_local bool empty = true;

TRITONSERVER_Error* is_small(TRITONBACKEND_Request* request, bool* small) {
  TRITONBACKEND_Input* image = nullptr;
  if (auto* error = TRITONBACKEND_RequestInputByIndex(request, 0, &image)) return error;
  const int64_t* shape = nullptr;  // [batch, height, width, 3]
  uint32_t rank = 0;
  if (auto* error = TRITONBACKEND_InputProperties(image, nullptr, nullptr, &shape, &rank, nullptr,
                                                  nullptr)) {
    return error;
  }
  *small = rank == 4 && shape[1] <= kLargestEdge && shape[2] <= kLargestEdge;
  return nullptr;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

EXPORTED TRITONSERVER_Error* TRITONBACKEND_ModelBatcherInitialize(TRITONBACKEND_Batcher** batcher,
                                                                  TRITONBACKEND_Model*) {
  *batcher = nullptr;
  return nullptr;
}

EXPORTED TRITONSERVER_Error* TRITONBACKEND_ModelBatcherFinalize(TRITONBACKEND_Batcher*) {
  return nullptr;
}

EXPORTED TRITONSERVER_Error* TRITONBACKEND_ModelBatchInitialize(const TRITONBACKEND_Batcher*,
                                                                void** batch) {
  *batch = nullptr;
  empty = true;
  return nullptr;
}

EXPORTED TRITONSERVER_Error* TRITONBACKEND_ModelBatchIncludeRequest(TRITONBACKEND_Request* request,
                                                                    void*, bool* include) {
  if (auto* error = is_small(request, include)) return error;
  *include = *include || empty;
  empty = false;
  return nullptr;
}

EXPORTED TRITONSERVER_Error* TRITONBACKEND_ModelBatchFinalize(void*) { return nullptr; }

}  // extern "C"
