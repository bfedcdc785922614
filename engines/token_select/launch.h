// What the plugin, compiled by a C++ compiler, needs of the kernels, compiled by a CUDA compiler.
#pragma once

#include <cstring>

#include <cuda_runtime_api.h>

#include "token_select.cuh"

namespace infoprune {

enum class FeatureKind { fp32, fp16, bf16 };

// Queue the kernel for features [batch, N, D]; `work` has batch * work_floats(s) floats, and kept is [batch, T].
cudaError_t launch_token_select(FeatureKind kind, int batch, const Settings &s, const void *features, const float *prior,
                                const int *counts, int *kept, float *work, cudaStream_t stream);

} // namespace infoprune
