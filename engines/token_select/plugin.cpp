// infoprune::TokenSelect for TensorRT 10.3 and later, as a library that TensorRT loads: trtexec --dynamicPlugins, or
// IPluginRegistry::loadLibrary. Programs that only open it need it compiled with TOKEN_SELECT_REGISTER.
// Inputs: features [B, N, D] fp32, fp16 or bf16, prior [B, N] fp32, counts [B] int32.
// Output: kept [B, T] int32, ascending, filled with -1.
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <new>
#include <sstream>
#include <string>

#include <NvInferRuntime.h>

#include "launch.h"

namespace infoprune {
namespace {

using namespace nvinfer1;

constexpr char kName[] = "TokenSelect", kVersion[] = "1", kNamespace[] = "infoprune";
constexpr int64_t kSharedBytes = 48 * 1024, kExactInFp32 = 1 << 24;

#ifdef TOKEN_SELECT_REGISTER
ILogger *find_logger() { return getLogger(); }
#else
ILoggerFinder *logger_finder = nullptr;
ILogger *find_logger() { return logger_finder ? logger_finder->findLogger() : nullptr; }
#endif

void log_error(const std::string &message) {
  ILogger *logger = find_logger();
  if (logger) logger->log(ILogger::Severity::kERROR, (std::string(kNamespace) + "::" + kName + ": " + message).c_str());
}

// ── Attributes ───────────────────────────────────────────────────────────────

struct Attributes {
  int32_t keep_numerator = 0, keep_denominator = 0;
  float pool_factor = 0, temperature = 0, exponent = 0, epsilon = 0;
};

std::array<PluginField, 6> fields_of(const Attributes &a) {
  const auto whole = [](const char *name, const int32_t &value) {
    return PluginField{name, &value, PluginFieldType::kINT32, 1};
  };
  const auto real = [](const char *name, const float &value) {
    return PluginField{name, &value, PluginFieldType::kFLOAT32, 1};
  };
  return {whole("keep_numerator", a.keep_numerator), whole("keep_denominator", a.keep_denominator),
          real("pool_factor", a.pool_factor),        real("temperature", a.temperature),
          real("exponent", a.exponent),              real("epsilon", a.epsilon)};
}

// A field's first value; parsers differ in how wide they make it.
bool read(const PluginField &field, double &value) {
  if (field.data == nullptr || field.length < 1) return false;
  switch (field.type) {
  case PluginFieldType::kINT32: value = *static_cast<const int32_t *>(field.data); return true;
  case PluginFieldType::kINT64: value = static_cast<double>(*static_cast<const int64_t *>(field.data)); return true;
  case PluginFieldType::kFLOAT32: value = *static_cast<const float *>(field.data); return true;
  case PluginFieldType::kFLOAT64: value = *static_cast<const double *>(field.data); return true;
  default: return false;
  }
}

// Why the attributes are not the operator's; empty if they are.
std::string parse(const PluginFieldCollection &collection, Attributes &attributes) {
  const double most = std::numeric_limits<float>::max(), whole = std::numeric_limits<int32_t>::max();
  const struct {
    const char *name;
    double low, high;
  } bounds[] = {{"keep_numerator", 1, whole},
                {"keep_denominator", 1, whole},
                {"pool_factor", 1, most},
                {"temperature", std::numeric_limits<float>::min(), most},
                {"exponent", 0, most},
                {"epsilon", 0, most}};
  double values[6];
  for (int i = 0; i < 6; ++i) {
    const auto *end = collection.fields + collection.nbFields;
    const auto *field = std::find_if(collection.fields, end, [&](const PluginField &f) {
      return f.name != nullptr && std::string(f.name) == bounds[i].name;
    });
    if (field == end || !read(*field, values[i])) return std::string("no number is given for ") + bounds[i].name;
    // A comparison that holds also refuses NaN.
    if (!(values[i] >= bounds[i].low && values[i] <= bounds[i].high)) {
      std::ostringstream reason;
      reason << bounds[i].name << " is " << values[i] << ", outside " << bounds[i].low << " to " << bounds[i].high;
      return reason.str();
    }
  }
  if (values[0] > values[1]) return "keep_numerator is larger than keep_denominator";
  attributes = {static_cast<int32_t>(values[0]), static_cast<int32_t>(values[1]), static_cast<float>(values[2]),
                static_cast<float>(values[3]),   static_cast<float>(values[4]),   static_cast<float>(values[5])};
  return "";
}

// ── Plugin ───────────────────────────────────────────────────────────────────

class TokenSelect final : public IPluginV3,
                          public IPluginV3OneCore,
                          public IPluginV3OneBuild,
                          public IPluginV3OneRuntime {
public:
  explicit TokenSelect(const Attributes &attributes) : attributes_(attributes), fields_(fields_of(attributes_)) {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
    }
    return nullptr;
  }
  // Its fields point into the object, so a copy is made from the attributes.
  IPluginV3 *clone() noexcept override { return new (std::nothrow) TokenSelect(attributes_); }

  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }

  // ── Build ──
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType *types, int32_t, const DataType *, int32_t) const noexcept override {
    types[0] = DataType::kINT32;
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs *inputs, int32_t count, const DimsExprs *, int32_t, DimsExprs *outputs,
                          int32_t, IExprBuilder &builder) noexcept override {
    if (count != 3 || inputs[0].nbDims != 3 || inputs[1].nbDims != 2 || inputs[2].nbDims != 1) {
      log_error("expected features [B, N, D], prior [B, N] and counts [B]");
      return -1;
    }
    const auto *wanted = builder.operation(DimensionOperation::kPROD, *inputs[0].d[1],
                                           *builder.constant(attributes_.keep_numerator));
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] =
        builder.operation(DimensionOperation::kCEIL_DIV, *wanted, *builder.constant(attributes_.keep_denominator));
    return 0;
  }

  bool supportsFormatCombination(int32_t place, const DynamicPluginTensorDesc *tensors, int32_t,
                                 int32_t) noexcept override {
    const PluginTensorDesc &tensor = tensors[place].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    switch (place) {
    case 0:
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    case 1: return tensor.type == DataType::kFLOAT;
    default: return tensor.type == DataType::kINT32;
    }
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t, const DynamicPluginTensorDesc *,
                          int32_t) noexcept override {
    const std::string reason = refusal(inputs[0].max);
    if (!reason.empty()) log_error(reason);
    return reason.empty() ? 0 : -1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t, const DynamicPluginTensorDesc *,
                          int32_t) const noexcept override {
    const Dims &most = inputs[0].max;
    return static_cast<size_t>(most.d[0]) * work_floats(settings(most)) * sizeof(float);
  }

  // ── Runtime ──
  int32_t onShapeChange(const PluginTensorDesc *, int32_t, const PluginTensorDesc *, int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc *tensors, const PluginTensorDesc *, const void *const *inputs,
                  void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
    const Dims &shape = tensors[0].dims;
    if (shape.d[0] == 0 || shape.d[1] == 0) return 0;
    const FeatureKind kind = tensors[0].type == DataType::kHALF   ? FeatureKind::fp16
                             : tensors[0].type == DataType::kBF16 ? FeatureKind::bf16
                                                                  : FeatureKind::fp32;
    const cudaError_t status = launch_token_select(
        kind, static_cast<int>(shape.d[0]), settings(shape), inputs[0], static_cast<const float *>(inputs[1]),
        static_cast<const int *>(inputs[2]), static_cast<int *>(outputs[0]), static_cast<float *>(workspace), stream);
    if (status != cudaSuccess) log_error(std::string("the launch failed: ") + cudaGetErrorString(status));
    return status == cudaSuccess ? 0 : -1;
  }

  IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override { return clone(); }
  const PluginFieldCollection *getFieldsToSerialize() noexcept override { return &collection_; }

private:
  Settings settings(const Dims &features) const {
    Settings result = {static_cast<int>(features.d[1]), static_cast<int>(features.d[2]), 0,
                       attributes_.keep_numerator,      attributes_.keep_denominator,    attributes_.pool_factor,
                       attributes_.temperature,         attributes_.exponent,            attributes_.epsilon};
    result.keep = keep_count(result.tokens, result);
    return result;
  }

  // Why the kernel cannot take features of this shape; empty if it can.
  std::string refusal(const Dims &features) const {
    if (features.d[1] >= kExactInFp32)
      return std::to_string(features.d[1]) + " tokens in an image are more than fp32 counts exactly; use smaller images";
    const Settings s = settings(features);
    const int64_t shared = shared_floats(s, kMaxThreads) * 4, floats = work_floats(s);
    if (shared > kSharedBytes)
      return std::to_string(s.width) + " dimensions and " + std::to_string(s.keep) + " kept tokens need " +
             std::to_string(shared) + " bytes of shared memory, a block has " + std::to_string(kSharedBytes) +
             "; keep fewer tokens";
    if (floats > std::numeric_limits<int32_t>::max())
      return "an image of " + std::to_string(s.tokens) + " tokens needs " + std::to_string(floats) +
             " floats of scratch, more than 31 bits count; keep fewer tokens";
    return "";
  }

  Attributes attributes_;
  std::array<PluginField, 6> fields_;
  PluginFieldCollection collection_;
};

// ── Creator ──────────────────────────────────────────────────────────────────

class Creator final : public IPluginCreatorV3One {
public:
  Creator() : fields_(fields_of(kinds_)) {
    for (PluginField &field : fields_) field.data = nullptr;
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  IPluginV3 *createPlugin(const char *, const PluginFieldCollection *collection, TensorRTPhase) noexcept override {
    Attributes attributes;
    const std::string reason = collection ? parse(*collection, attributes) : "no attributes are given";
    if (!reason.empty()) {
      log_error(reason);
      return nullptr;
    }
    return new (std::nothrow) TokenSelect(attributes);
  }
  const PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }
  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }

private:
  Attributes kinds_;
  std::array<PluginField, 6> fields_;
  PluginFieldCollection collection_;
};

Creator creator;

#ifdef TOKEN_SELECT_REGISTER
// Opening the library is enough; TensorRT would refuse to register the plugin a second time.
const bool registered = getPluginRegistry()->registerCreator(creator, kNamespace);
#endif

} // namespace
} // namespace infoprune

// ── What TensorRT looks for in the library ───────────────────────────────────
#ifndef TOKEN_SELECT_REGISTER

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder *finder) {
  infoprune::logger_finder = finder;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface *const *
getCreators(int32_t &count) {
  static nvinfer1::IPluginCreatorInterface *const creators[] = {&infoprune::creator};
  count = 1;
  return creators;
}

#endif
