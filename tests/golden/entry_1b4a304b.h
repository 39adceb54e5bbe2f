// What is called from outside.

// Makes m rows and rounds them to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_rows(const void* const* operands, const int64_t* steps, int64_t m,
                                const float* limit, void* codes, float* amax, void* const* more,
                                int threads) {
  const Call call{operands, steps, more};
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < m; ++row) {
    alignas(64) float row0[K];
    prologue(call, row, row0);
    amax[row] = quantize_row(row0, 1, q + row * K);
  }
  return 0;
}
