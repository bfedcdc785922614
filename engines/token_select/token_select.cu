// Launches the kernels from C++.
#include "launch.h"

namespace infoprune {

cudaError_t launch_token_select(FeatureKind kind, int batch, const Settings &s, const void *features, const float *prior,
                                const int *counts, int *kept, float *work, cudaStream_t stream) {
  const auto bits = [](float value) {
    int result;
    memcpy(&result, &value, sizeof result);
    return result;
  };
  const auto shared = static_cast<size_t>(shared_floats(s, kMaxThreads)) * sizeof(float);
  const auto run = [&](auto kernel, const auto *typed) {
    kernel<<<batch, kMaxThreads, shared, stream>>>(
        typed, prior, counts, s.tokens, s.width, s.keep, static_cast<int>(work_floats(s)), s.numerator, s.denominator,
        bits(s.pool_factor), bits(s.temperature), bits(s.exponent), bits(s.epsilon), kept, work);
  };
  switch (kind) {
  case FeatureKind::fp32: run(token_select_f32, static_cast<const float *>(features)); break;
  case FeatureKind::fp16: run(token_select_f16, static_cast<const Half *>(features)); break;
  case FeatureKind::bf16: run(token_select_bf16, static_cast<const BFloat *>(features)); break;
  }
  return cudaGetLastError();
}

} // namespace infoprune
