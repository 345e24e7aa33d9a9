// Drives the TensorRT plugin as a builder and a runtime do, through the registry that it registered
// itself with; sizes are computed by an expression builder of our own, since a real one needs a GPU.
//
// Reads cases, "pad kernel_size max_displacement stride1 stride2 N C H W", from standard input and
// prints a line for each: "refused" if the creator does, else the output's shape. Anything that a
// plugin may never do ends the program with a message and 1.
#include <NvInfer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <vector>

#include "correlation.h"

namespace {

using namespace nvinfer1;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tensorrt_harness: not so: %s\n", what);
  std::exit(1);
}

class Number final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Number(int64_t value) : value_(value) { IDimensionExpr::mImpl = this; }
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  int64_t value_;
};

class Numbers final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Numbers() { IExprBuilder::mImpl = this; }
  const IDimensionExpr* constant(int64_t value) noexcept override {
    numbers_.push_back(std::make_unique<Number>(value));
    return numbers_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation operation, const IDimensionExpr& first,
                                  const IDimensionExpr& second) noexcept override {
    const int64_t a = first.getConstantValue(), b = second.getConstantValue();
    switch (operation) {
      case DimensionOperation::kSUM:
        return constant(a + b);
      case DimensionOperation::kCEIL_DIV:
        require(a > 0 && b > 0, "sizes are positive");
        return constant((a + b - 1) / b);
      default:
        require(false, "only sums and divisions are needed");
        return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) noexcept override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Number>> numbers_;
};

template <class T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  T* interface = static_cast<T*>(plugin->getCapabilityInterface(type));
  require(interface != nullptr, "the plugin has every capability");
  return interface;
}

PluginTensorDesc tensor(DataType type, TensorFormat format, const int64_t* shape) {
  PluginTensorDesc description{};
  description.type = type;
  description.format = format;
  description.dims.nbDims = 4;
  std::copy(shape, shape + 4, description.dims.d);
  return description;
}

void check_types(IPluginV3OneBuild* build, const int64_t* shape) {
  for (DataType first : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kBF16})
    for (DataType second : {DataType::kFLOAT, DataType::kHALF})
      for (TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kHWC8}) {
        DynamicPluginTensorDesc tensors[3] = {};
        tensors[0].desc = tensor(first, format, shape);
        tensors[1].desc = tensor(second, format, shape);
        tensors[2].desc = tensor(first, format, shape);
        bool accepted = true;
        for (int i = 0; i < 3; ++i)
          accepted &= build->supportsFormatCombination(i, tensors, 2, 1);
        const bool right = first == second && format == TensorFormat::kLINEAR;
        require(accepted == right, "two floats or two halves, linear, and nothing else");
        const DataType inputs[2] = {first, second};
        DataType output = DataType::kINT8;
        const int32_t failed = build->getOutputDataTypes(&output, 1, inputs, 2);
        require((failed == 0) == (first == second), "output types as for the inputs");
        require(failed != 0 || output == first, "the output has the inputs' type");
      }
}

}  // namespace

int main() {
  auto* found = getPluginRegistry()->getCreator("Correlation", "1", "flownet2");
  require(found != nullptr, "loading the library registered Correlation 1 flownet2");
  auto* creator = static_cast<IPluginCreatorV3One*>(found);
  require(creator->getFieldNames()->nbFields == 5, "there are five attributes");

  int32_t values[5];
  int64_t shape[4];
  while (std::cin >> values[0] >> values[1] >> values[2] >> values[3] >> values[4] >> shape[0] >>
         shape[1] >> shape[2] >> shape[3]) {
    PluginField fields[5];
    for (int i = 0; i < 5; ++i)
      fields[i] = {flownet2::kAttributeNames[i], &values[i], PluginFieldType::kINT32, 1};
    const PluginFieldCollection collection{5, fields};
    std::unique_ptr<IPluginV3> built(
        creator->createPlugin("node", &collection, TensorRTPhase::kBUILD));
    if (!built) {
      std::puts("refused");
      continue;
    }
    // The engine's file carries what the plugin serializes; a runtime builds it again from that.
    std::unique_ptr<IPluginV3> copied(built->clone());
    const auto* serialized =
        capability<IPluginV3OneRuntime>(copied.get(), PluginCapabilityType::kRUNTIME)
            ->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> plugin(
        creator->createPlugin("node", serialized, TensorRTPhase::kRUNTIME));
    require(plugin != nullptr, "what a plugin serializes makes a plugin");
    built.reset();
    copied.reset();

    auto* core = capability<IPluginV3OneCore>(plugin.get(), PluginCapabilityType::kCORE);
    require(std::strcmp(core->getPluginName(), "Correlation") == 0 &&
                std::strcmp(core->getPluginVersion(), "1") == 0 &&
                std::strcmp(core->getPluginNamespace(), "flownet2") == 0,
            "the plugin is Correlation 1 flownet2");
    auto* build = capability<IPluginV3OneBuild>(plugin.get(), PluginCapabilityType::kBUILD);
    require(build->getNbOutputs() == 1, "there is one output");
    check_types(build, shape);

    auto* runtime = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
    const PluginTensorDesc inputs[2] = {tensor(DataType::kFLOAT, TensorFormat::kLINEAR, shape),
                                        tensor(DataType::kFLOAT, TensorFormat::kLINEAR, shape)};
    if (runtime->onShapeChange(inputs, 2, inputs, 1) != 0) {
      std::puts("refused");
      continue;
    }
    Numbers numbers;
    DimsExprs expressions[2], output;
    for (auto& input : expressions) {
      input.nbDims = 4;
      for (int i = 0; i < 4; ++i) input.d[i] = numbers.constant(shape[i]);
    }
    require(build->getOutputShapes(expressions, 2, nullptr, 0, &output, 1, numbers) == 0 &&
                output.nbDims == 4,
            "there is an output shape");
    for (int i = 0; i < 4; ++i)
      std::printf("%lld ", static_cast<long long>(output.d[i]->getConstantValue()));
    std::puts("");

    PluginTensorDesc other[2] = {inputs[0], inputs[1]};
    other[1].dims.d[3] += 1;
    require(runtime->onShapeChange(other, 2, inputs, 1) != 0, "different shapes are refused");
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    require(attached != nullptr && attached != plugin, "a context gets a plugin of its own");
  }
  return 0;
}
