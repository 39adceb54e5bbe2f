// What is called from outside.

// Rounds m rows, x_row elements apart, to codes [m, K]; gives how many numbers were too large.
extern "C" int64_t fxquant_quantize(const void* x, int64_t x_row, int64_t x_col, int64_t m,
                                    const float* limit, void* codes, float* amax, int threads) {
  const stored_t* rows = static_cast<const stored_t*>(x);
  int8_t* q = static_cast<int8_t*>(codes);
  if (m * K < 1 << 14) threads = 1;  // to wake others takes longer
  uint32_t largest = 0;
  // With the stride a constant the usual case becomes vector instructions.
#pragma omp parallel for num_threads(threads) reduction(max : largest)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    const uint32_t found = x_col == 1 ? largest_of(from, 1) : largest_of(from, x_col);
    largest = found > largest ? found : largest;
  }
  const float most = at_least(*limit, 0x1p-100f);
  const bool is_finite = largest < INFINITE && most == most;
  const float scale = is_finite ? at_most(at_least(float_of(largest), 0x1p-100f), most) : NAN;
  const float factor = 127.0f / scale;
  int64_t saturated = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : saturated)
  for (int64_t row = 0; row < m; ++row) {
    const stored_t* from = rows + row * x_row;
    amax[row] = scale;
    if (!is_finite)
      std::memset(q + row * K, 0, K);
    else if (x_col == 1)
      round_row(from, 1, factor, q + row * K);
    else
      round_row(from, x_col, factor, q + row * K);
    if (is_finite && float_of(largest) > scale) saturated += count_above(from, x_col, scale);
  }
  return saturated;
}
