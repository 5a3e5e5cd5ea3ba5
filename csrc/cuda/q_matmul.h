// The launchers that the table in q_matmul.cu chooses from; each takes what its row there says.
#pragma once

#include "../launch.h"

// Up to 16 rows of x, K up to 2^20 (q_small.cu); the workspace is that of gather.
const char* auto_gptq_cuda_q_small(const auto_gptq::Product* product, void* stream);

// Bring x, [M, K] of a 16-bit type, into the order of the tiles: into the workspace.
const char* auto_gptq_cuda_gather(const auto_gptq::Product* product, void* stream);

// Bytes of x in the order of the tiles; 0 if that is its own.
int64_t auto_gptq_cuda_sorted_x_bytes(const auto_gptq::Product* product);
