// The launchers that the table in q_matmul.cu chooses from; each takes what its row there says.
#pragma once

#include "../launch.h"

// Up to 16 rows of x, K up to 2^20 (q_small.cu); the workspace is that of gather.
const char* auto_gptq_cuda_q_small(const auto_gptq::Product* product, void* stream);

// Bring x, [M, K] of a 16-bit type, into the order of the tiles: into the workspace.
const char* auto_gptq_cuda_gather(const auto_gptq::Product* product, void* stream);

// Bytes of x in the order of the tiles; 0 if that is its own.
int64_t auto_gptq_cuda_sorted_x_bytes(const auto_gptq::Product* product);

// Some dozen rows of x, sm_80 and later (q_mma.cu).  Exported for tests: on Hopper the table prefers
// others.
AUTO_GPTQ_API const char* auto_gptq_cuda_q_mma(const auto_gptq::Product* product, void* stream);
AUTO_GPTQ_API int64_t auto_gptq_cuda_q_mma_bytes(const auto_gptq::Product* product);

// Some dozen to some hundred rows of x, sm_90 alone (q_wgmma_sm90.cu).
const char* auto_gptq_cuda_q_wgmma(const auto_gptq::Product* product, void* stream);
int64_t auto_gptq_cuda_q_wgmma_bytes(const auto_gptq::Product* product);

// Hundreds of rows of x and more, sm_90 alone (q_wide_sm90.cu).
const char* auto_gptq_cuda_q_wide(const auto_gptq::Product* product, void* stream);
int64_t auto_gptq_cuda_q_wide_bytes(const auto_gptq::Product* product);
