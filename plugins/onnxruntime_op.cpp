// ONNX Runtime's side of the correlation: the custom op flownet2::Correlation, for the GPU in float
// and half where the build had CUDA, and for the CPU in float.
//
// Nothing throws: every failure goes back to ONNX Runtime as a status. The library does not link
// ONNX Runtime; the session that loads it hands the API over.
// SPDX-License-Identifier: GPL-3.0-or-later
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <new>

#include "correlation.h"

namespace {

using flownet2::CorrelationStatus;

OrtStatus* refusal(const OrtApi& api, CorrelationStatus status) {
  if (status == CorrelationStatus::kOk) return nullptr;
  const bool failed = status == CorrelationStatus::kLaunchFailed;
  return api.CreateStatus(failed ? ORT_EP_FAIL : ORT_INVALID_ARGUMENT,
                          flownet2::correlation_message(status));
}

// `shape` from a value that must have four dimensions.
OrtStatus* read_shape(const OrtApi& api, const OrtValue* value, flownet2::FeatureShape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = api.GetTensorTypeAndShape(value, &info)) return status;
  size_t rank = 0;
  int64_t sizes[4] = {};
  OrtStatus* status = api.GetDimensionsCount(info, &rank);
  if (status == nullptr && rank == 4) status = api.GetDimensions(info, sizes, 4);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status == nullptr && rank != 4) status = refusal(api, CorrelationStatus::kBadShape);
  *shape = {sizes[0], sizes[1], sizes[2], sizes[3]};
  return status;
}

// One call's tensors, once their shapes agree with the attributes.
struct Call {
  flownet2::FeatureShape input;
  const void* a = nullptr;
  const void* b = nullptr;
  void* out = nullptr;
};

OrtStatus* read_call(const OrtApi& api, const flownet2::CorrelationAttributes& attributes,
                     OrtKernelContext* context, Call* call) {
  const OrtValue* inputs[2] = {};
  flownet2::FeatureShape shapes[2];
  const void* data[2] = {};
  for (size_t i = 0; i < 2; ++i) {
    if (OrtStatus* status = api.KernelContext_GetInput(context, i, &inputs[i])) return status;
    if (OrtStatus* status = read_shape(api, inputs[i], &shapes[i])) return status;
    void* pointer = nullptr;  // the C API has no const version of this call in 1.21
    if (OrtStatus* status =
            api.GetTensorMutableData(const_cast<OrtValue*>(inputs[i]), &pointer))
      return status;
    data[i] = pointer;
  }
  const flownet2::FeatureShape &a = shapes[0], &b = shapes[1];
  if (a.batch != b.batch || a.channels != b.channels || a.height != b.height ||
      a.width != b.width)
    return refusal(api, CorrelationStatus::kBadShape);

  flownet2::FeatureShape output;
  if (OrtStatus* status = refusal(api, flownet2::output_shape(attributes, a, &output)))
    return status;
  const int64_t sizes[4] = {output.batch, output.channels, output.height, output.width};
  OrtValue* result = nullptr;
  if (OrtStatus* status = api.KernelContext_GetOutput(context, 0, sizes, 4, &result))
    return status;
  call->input = a;
  call->a = data[0];
  call->b = data[1];
  return api.GetTensorMutableData(result, &call->out);
}

struct CpuKernel {
  const OrtApi& api;
  flownet2::CorrelationAttributes attributes;

  OrtStatus* ComputeV2(OrtKernelContext* context) noexcept {
    Call call;
    if (OrtStatus* status = read_call(api, attributes, context, &call)) return status;
    return refusal(api, flownet2::correlation_cpu(
                            attributes, call.input, static_cast<const float*>(call.a),
                            static_cast<const float*>(call.b), static_cast<float*>(call.out)));
  }
};

#ifdef FLOWNET2_CUDA
template <flownet2::ElementType type>
struct CudaKernel {
  const OrtApi& api;
  flownet2::CorrelationAttributes attributes;

  OrtStatus* ComputeV2(OrtKernelContext* context) noexcept {
    Call call;
    if (OrtStatus* status = read_call(api, attributes, context, &call)) return status;
    void* stream = nullptr;
    if (OrtStatus* status = api.KernelContext_GetGPUComputeStream(context, &stream))
      return status;
    return refusal(api, flownet2::correlation_cuda(attributes, call.input, type, call.a, call.b,
                                                   call.out, static_cast<CUstream_st*>(stream)));
  }
};
#endif

template <class Kernel, flownet2::ElementType type>
struct CorrelationOp : Ort::CustomOpBase<CorrelationOp<Kernel, type>, Kernel, true> {
  const char* provider;

  explicit CorrelationOp(const char* name) : provider(name) {}

  const char* GetName() const { return "Correlation"; }
  const char* GetExecutionProviderType() const { return provider; }
  size_t GetInputTypeCount() const { return 2; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const {
    return type == flownet2::ElementType::kFloat16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                                   : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return GetInputType(index); }

  OrtStatus* CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    flownet2::CorrelationAttributes attributes;
    for (const char* name : flownet2::kAttributeNames) {
      int64_t value = 0;
      if (OrtStatus* status = api.KernelInfoGetAttribute_int64(info, name, &value)) return status;
      flownet2::set_attribute(&attributes, name, value);
    }
    if (OrtStatus* status = refusal(api, flownet2::check_attributes(attributes))) return status;
    *kernel = new (std::nothrow) Kernel{api, attributes};
    return *kernel != nullptr ? nullptr : api.CreateStatus(ORT_FAIL, "Correlation: no memory");
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using flownet2::ElementType;
  static const CorrelationOp<CpuKernel, ElementType::kFloat32> cpu("CPUExecutionProvider");
#ifdef FLOWNET2_CUDA
  static const CorrelationOp<CudaKernel<ElementType::kFloat32>, ElementType::kFloat32> cuda_float(
      "CUDAExecutionProvider");
  static const CorrelationOp<CudaKernel<ElementType::kFloat16>, ElementType::kFloat16> cuda_half(
      "CUDAExecutionProvider");
  static const OrtCustomOp* const ops[] = {&cpu, &cuda_float, &cuda_half};
#else
  static const OrtCustomOp* const ops[] = {&cpu};
#endif

  // Null if the runtime is older than the headers; then there is no API to report it.
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    api = base->GetApi(1);
    return api->CreateStatus(ORT_NOT_IMPLEMENTED,
                             "Correlation: this library was built with headers of a newer ONNX "
                             "Runtime; build it with the headers of the one that loads it");
  }
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = api->CreateCustomOpDomain("flownet2", &domain)) return status;
  for (const OrtCustomOp* op : ops)
    if (OrtStatus* status = api->CustomOpDomain_Add(domain, op)) {
      api->ReleaseCustomOpDomain(domain);
      return status;
    }
  // The session options keep a pointer only: the domain lives as long as the library.
  return api->AddCustomOpDomain(options, domain);
}
