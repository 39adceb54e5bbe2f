// What benchmarks/machine.py measures a machine with: reads at full speed, and loops of nothing but
// one dot-product instruction. Built with -march=native; an instruction that is not there has rate 0.

#include <cstdint>

namespace {

constexpr int64_t kLine = 64;
// More lines in flight than one stream keeps; software prefetch only slows this down.
constexpr int kStreams = 4;
using Block = int64_t __attribute__((vector_size(kLine)));

}  // namespace

// Reads `bytes` once, each thread its part as several streams. What it returns depends on every
// line, so that none is left out.
extern "C" int64_t read_once(const char* data, int64_t bytes, int threads) {
  const int64_t share = bytes / threads / (kStreams * kLine) * kLine;
  int64_t seen = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : seen)
  for (int part = 0; part < threads; ++part) {
    const char* first = data + part * share * kStreams;
    Block sum = {};
    for (int64_t at = 0; at < share; at += kLine)
      for (int stream = 0; stream < kStreams; ++stream)
        sum ^= *reinterpret_cast<const Block*>(first + stream * share + at);
    for (int lane = 0; lane < 8; ++lane) seen += sum[lane];
  }
  return seen;
}

// Each of these runs an instruction on 14 independent sums (more than its latency times those that
// start in a cycle) and returns the multiply-adds that were done. The registers are named in the
// text because compilers keep an array of sums in memory.
#define CHAINS "0,1,2,3,4,5,6,7,8,9,10,11,12,13"
#define CLOBBERED                                                                            \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define REPEATED(instruction, width, each)                                                   \
  _Pragma("omp parallel num_threads(threads)") {                                             \
    asm volatile(".irp register," CHAINS ",14,15\n\t"                                        \
                 "vpxor %%xmm\\register, %%xmm\\register, %%xmm\\register\n\t.endr" ::       \
                     : CLOBBERED);                                                           \
    for (int64_t turn = 0; turn < turns; ++turn)                                             \
      asm volatile(".irp sum," CHAINS "\n\t" instruction " %%" width "mm15, %%" width        \
                   "mm14, %%" width "mm\\sum\n\t.endr" ::                                    \
                       : CLOBBERED);                                                         \
  }                                                                                          \
  return turns * threads * 14 * (each)

extern "C" int64_t dot_float32(int64_t turns, int threads) {
#if defined(__AVX512F__)
  REPEATED("vfmadd231ps", "z", 16);
#elif defined(__FMA__)
  REPEATED("vfmadd231ps", "y", 8);
#else
  return 0;
#endif
}

extern "C" int64_t dot_bfloat16(int64_t turns, int threads) {
#if defined(__AVX512BF16__)
  REPEATED("vdpbf16ps", "z", 32);
#else
  return 0;
#endif
}

extern "C" int64_t dot_int8(int64_t turns, int threads) {
#if defined(__AVX512VNNI__)
  REPEATED("vpdpbusd", "z", 64);
#else
  return 0;
#endif
}
