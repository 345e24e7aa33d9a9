// TensorRT's side of the correlation: plugin Correlation, version 1, namespace flownet2.
//
// One class is core, build and runtime of an IPluginV3. Every method that TensorRT calls reports
// failure by its return value and says why through TensorRT's logger; nothing throws.
// SPDX-License-Identifier: GPL-3.0-or-later
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

#include "correlation.h"

#define EXPORTED __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;
using flownet2::CorrelationAttributes;
using flownet2::CorrelationStatus;

constexpr char kName[] = "Correlation";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "flownet2";
constexpr int32_t kFields = sizeof(flownet2::kAttributeNames) / sizeof(*flownet2::kAttributeNames);

// Set when TensorRT loads the library itself (trtexec --dynamicPlugins).
std::atomic<ILoggerFinder*> logger_finder{nullptr};

void log_error(const char* message) noexcept {
  ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = finder != nullptr ? finder->findLogger() : getLogger();
  if (logger != nullptr)
    logger->log(ILogger::Severity::kERROR, message);
  else
    std::fprintf(stderr, "%s\n", message);
}

bool accept(CorrelationStatus status) noexcept {
  if (status != CorrelationStatus::kOk) log_error(flownet2::correlation_message(status));
  return status == CorrelationStatus::kOk;
}

bool supported(DataType type) noexcept {
  return type == DataType::kFLOAT || type == DataType::kHALF;
}

// The inputs' common shape; false, and a message, if they have none.
bool read_shape(const PluginTensorDesc* inputs, flownet2::FeatureShape* shape) noexcept {
  const Dims &a = inputs[0].dims, &b = inputs[1].dims;
  bool same = a.nbDims == 4 && b.nbDims == 4;
  for (int i = 0; same && i < 4; ++i) same = a.d[i] == b.d[i];
  if (!same) return accept(CorrelationStatus::kBadShape);
  *shape = {a.d[0], a.d[1], a.d[2], a.d[3]};
  return true;
}

class CorrelationPlugin final : public IPluginV3,
                                public IPluginV3OneCore,
                                public IPluginV3OneBuild,
                                public IPluginV3OneRuntime {
 public:
  explicit CorrelationPlugin(const CorrelationAttributes& attributes) noexcept
      : attributes_(attributes) {}

  // IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
      default:
        return nullptr;
    }
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) CorrelationPlugin(attributes_); }

  // Core
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return 1; }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override {
    if (inputs != 2 || outputs != 1) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    return tensor.format == TensorFormat::kLINEAR && supported(tensor.type) &&
           tensor.type == tensors[0].desc.type;
  }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (output_count != 1 || input_count != 2 || inputs[0] != inputs[1] ||
        !supported(inputs[0])) {
      log_error("Correlation: a and b must both be FLOAT or both be HALF");
      return -1;
    }
    outputs[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                          DimsExprs* outputs, int32_t output_count,
                          IExprBuilder& expressions) noexcept override {
    if (input_count != 2 || output_count != 1 || inputs[0].nbDims != 4 || inputs[1].nbDims != 4) {
      log_error(flownet2::correlation_message(CorrelationStatus::kBadShape));
      return -1;
    }
    const int64_t displacements = 2 * int64_t{attributes_.radius()} + 1;
    const int64_t border =
        2 * (int64_t{attributes_.pad} - attributes_.max_displacement - attributes_.kernel_size / 2);
    outputs[0].nbDims = 4;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = expressions.constant(displacements * displacements);
    for (int i = 2; i < 4; ++i) {
      const IDimensionExpr* size = expressions.operation(
          DimensionOperation::kSUM, *inputs[0].d[i], *expressions.constant(border));
      outputs[0].d[i] = expressions.operation(DimensionOperation::kCEIL_DIV, *size,
                                              *expressions.constant(attributes_.stride1));
    }
    return 0;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t inputs,
                          const DynamicPluginTensorDesc*, int32_t outputs) noexcept override {
    return inputs == 2 && outputs == 1 ? 0 : -1;
  }

  // Runtime
  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    flownet2::FeatureShape input, output;
    return read_shape(inputs, &input) &&
                   accept(flownet2::output_shape(attributes_, input, &output))
               ? 0
               : -1;
  }

  int32_t enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    flownet2::FeatureShape input;
    if (!read_shape(input_descriptions, &input)) return -1;
    const auto type = input_descriptions[0].type == DataType::kHALF
                          ? flownet2::ElementType::kFloat16
                          : flownet2::ElementType::kFloat32;
    return accept(flownet2::correlation_cuda(attributes_, input, type, inputs[0], inputs[1],
                                             outputs[0], stream))
               ? 0
               : -1;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    const int32_t* const values[kFields] = {&attributes_.pad, &attributes_.kernel_size,
                                            &attributes_.max_displacement, &attributes_.stride1,
                                            &attributes_.stride2};
    for (int32_t i = 0; i < kFields; ++i)
      fields_[i] = {flownet2::kAttributeNames[i], values[i], PluginFieldType::kINT32, 1};
    serialized_ = {kFields, fields_};
    return &serialized_;
  }

 private:
  const CorrelationAttributes attributes_;
  PluginField fields_[kFields];
  PluginFieldCollection serialized_{};
};

class CorrelationCreator final : public IPluginCreatorV3One {
 public:
  CorrelationCreator() noexcept {
    for (int32_t i = 0; i < kFields; ++i)
      fields_[i] = {flownet2::kAttributeNames[i], nullptr, PluginFieldType::kINT32, 1};
    collection_ = {kFields, fields_};
  }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  // Attributes come from the ONNX node (build) or from getFieldsToSerialize (an engine's file).
  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields,
                          TensorRTPhase) noexcept override {
    CorrelationAttributes attributes;
    for (const char* name : flownet2::kAttributeNames) {
      int64_t value = 0;
      if (!read_field(fields, name, &value)) {
        char message[96];
        std::snprintf(message, sizeof(message), "Correlation: attribute %s must be one integer",
                      name);
        log_error(message);
        return nullptr;
      }
      flownet2::set_attribute(&attributes, name, value);
    }
    if (!accept(flownet2::check_attributes(attributes))) return nullptr;
    return new (std::nothrow) CorrelationPlugin(attributes);
  }

 private:
  static bool read_field(const PluginFieldCollection* fields, const char* name,
                         int64_t* value) noexcept {
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      if (std::strcmp(field.name, name) != 0 || field.data == nullptr || field.length != 1)
        continue;
      if (field.type == PluginFieldType::kINT32) {
        *value = *static_cast<const int32_t*>(field.data);
        return true;
      }
      if (field.type == PluginFieldType::kINT64) {
        *value = *static_cast<const int64_t*>(field.data);
        return true;
      }
    }
    return false;
  }

  PluginField fields_[kFields];
  PluginFieldCollection collection_{};
};

CorrelationCreator creator;

// Registers on loading: for Triton's plugins=, LD_PRELOAD and trtexec --staticPlugins, which load
// the library and call nothing in it.
std::atomic<bool> registered{getPluginRegistry()->registerCreator(creator, kNamespace)};

}  // namespace

// Called by IPluginRegistry::loadLibrary (trtexec --dynamicPlugins), which registers the plugins
// itself and fails if they are registered already. The registration on loading is undone first.
extern "C" EXPORTED void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

extern "C" EXPORTED IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static IPluginCreatorInterface* const creators[] = {&creator};
  if (registered.exchange(false)) getPluginRegistry()->deregisterCreator(creator);
  count = 1;
  return creators;
}
