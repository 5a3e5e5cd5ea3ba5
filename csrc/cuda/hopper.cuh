// What Hopper (sm_90a) adds and CUDA C++ does not spell: barriers that count bytes, bulk copies,
// clusters, and products of whole warpgroups.  PTX ISA, sections "mbarrier", "cp.async.bulk" and
// "wgmma".
#pragma once

#include <cuda.h>

#include <cstdint>

namespace auto_gptq::hopper {

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Barriers are there before any copy or other block of the cluster sees them.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the barrier wait for the bytes of bulk copies as well.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Multiples of 16 bytes, aligned to 16.
__device__ __forceinline__ void bulk_copy(uint32_t to,
                                          const void* from,
                                          uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Counts every thread of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// The same, but orders no memory.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                   : "memory");
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Arrive at the same barrier in another block of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   map_shared(barrier, rank))
               : "memory");
}

// Boxes of a matrix: into every block of the cluster that the mask names, at the same place, or out
// of shared memory.  What lies outside the matrix reads as zeros and is not written.
__device__ __forceinline__ void box_copy(uint32_t to,
                                         const CUtensorMap* map,
                                         int column,
                                         int row,
                                         uint32_t barrier,
                                         uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}

// Get a description ready: the first copy waits for it otherwise.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void box_store(const CUtensorMap* map,
                                          int column,
                                          int row,
                                          uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}

// Until at most so many of this thread's stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void box_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Ordinary stores to shared memory come before copies out of it.
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Tell another block that what this one has written is there: a number that it waits for.  What is
// there then may be copied.
__device__ __forceinline__ void set_flag(uint64_t* flag, uint64_t number) {
  __threadfence();
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(number) : "memory");
}

// The flag is zero afterwards.
__device__ __forceinline__ void wait_for_flag(uint64_t* flag, uint64_t number) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  } while (found != number);
  *flag = 0;
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// 16 bytes to the shared memory of another block; tell a barrier over there that they have come.
__device__ __forceinline__ void store_remote(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before the first product of a group, after the last write to its registers.
__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most so many groups run.
template <int PENDING>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Rows of 64 halves, swizzled over 128 bytes, eight of them to 1024 bytes.  Add 2 for the next 16.
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// PTX wants every register by name, so one product is a list of up to 128 of them.
#define AUTO_GPTQ_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define AUTO_GPTQ_D8(i)                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),       \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define AUTO_GPTQ_D32(i) \
  AUTO_GPTQ_D8(i), AUTO_GPTQ_D8(i + 8), AUTO_GPTQ_D8(i + 16), AUTO_GPTQ_D8(i + 24)
#define AUTO_GPTQ_WGMMA(ROWS, TYPE, LIST, A0, A1, A2, A3, B, P, ...)                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                            \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #ROWS "k16.f32." TYPE "." TYPE " {" LIST "}, " \
               "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 0;\n}\n"                 \
               : __VA_ARGS__                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#define AUTO_GPTQ_WGMMAS(TYPE)                                                                   \
  if constexpr (ROWS == 32) {                                                                    \
    AUTO_GPTQ_WGMMA(32, TYPE, AUTO_GPTQ_TEN() "%10,%11,%12,%13,%14,%15", 16, 17, 18, 19, 20, 21, \
                    AUTO_GPTQ_D8(0), AUTO_GPTQ_D8(8));                                           \
  } else if constexpr (ROWS == 64) {                                                             \
    AUTO_GPTQ_WGMMA(64, TYPE, AUTO_GPTQ_TEN() AUTO_GPTQ_TEN(1) AUTO_GPTQ_TEN(2) "%30,%31", 32,   \
                    33, 34, 35, 36, 37, AUTO_GPTQ_D32(0));                                       \
  } else if constexpr (ROWS == 128) {                                                            \
    AUTO_GPTQ_WGMMA(128, TYPE,                                                                   \
                    AUTO_GPTQ_TEN() AUTO_GPTQ_TEN(1) AUTO_GPTQ_TEN(2) AUTO_GPTQ_TEN(3)           \
                        AUTO_GPTQ_TEN(4) AUTO_GPTQ_TEN(5) "%60,%61,%62,%63",                     \
                    64, 65, 66, 67, 68, 69, AUTO_GPTQ_D32(0), AUTO_GPTQ_D32(32));                \
  } else if constexpr (ROWS == 192) {                                                            \
    AUTO_GPTQ_WGMMA(192, TYPE,                                                                   \
                    AUTO_GPTQ_TEN() AUTO_GPTQ_TEN(1) AUTO_GPTQ_TEN(2) AUTO_GPTQ_TEN(3)           \
                        AUTO_GPTQ_TEN(4) AUTO_GPTQ_TEN(5) AUTO_GPTQ_TEN(6) AUTO_GPTQ_TEN(7)      \
                            AUTO_GPTQ_TEN(8) "%90,%91,%92,%93,%94,%95",                          \
                    96, 97, 98, 99, 100, 101, AUTO_GPTQ_D32(0), AUTO_GPTQ_D32(32),               \
                    AUTO_GPTQ_D32(64));                                                          \
  } else {                                                                                       \
    static_assert(ROWS == 256);                                                                  \
    AUTO_GPTQ_WGMMA(                                                                             \
        256, TYPE,                                                                               \
        AUTO_GPTQ_TEN() AUTO_GPTQ_TEN(1) AUTO_GPTQ_TEN(2) AUTO_GPTQ_TEN(3) AUTO_GPTQ_TEN(4)      \
            AUTO_GPTQ_TEN(5) AUTO_GPTQ_TEN(6) AUTO_GPTQ_TEN(7) AUTO_GPTQ_TEN(8) AUTO_GPTQ_TEN(9) \
                AUTO_GPTQ_TEN(10) AUTO_GPTQ_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127",   \
        128, 129, 130, 131, 132, 133, AUTO_GPTQ_D32(0), AUTO_GPTQ_D32(32), AUTO_GPTQ_D32(64),    \
        AUTO_GPTQ_D32(96));                                                                      \
  }

// d[64, ROWS] = a[64, 16] b[ROWS, 16]^T, plus what d was if `add`; a in registers.
template <int ROWS, bool BF16>
__device__ __forceinline__ void mma(float (&d)[ROWS / 2],
                                    const uint32_t (&a)[4],
                                    uint64_t b,
                                    int add) {
  if constexpr (BF16) {
    AUTO_GPTQ_WGMMAS("bf16")
  } else {
    AUTO_GPTQ_WGMMAS("f16")
  }
}

#undef AUTO_GPTQ_TEN
#undef AUTO_GPTQ_D8
#undef AUTO_GPTQ_D32
#undef AUTO_GPTQ_WGMMA
#undef AUTO_GPTQ_WGMMAS

}  // namespace auto_gptq::hopper
