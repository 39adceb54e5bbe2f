// What is called from outside.

namespace {

// What is kept of all rows.
void take_shared(Call& call, Memory& memory, int64_t threads) {
  call.turns = memory.take<Turn>(threads);
}

// What is kept of the rows under work.
void take_own(Call& call, Memory& memory, int64_t rows, int64_t threads) {
  const int64_t all = std::max(padded(rows, FEW_HEIGHTS), padded(rows, MANY_HEIGHTS));
  call.lines = memory.take<x_t>(E * rows * ALL_STEPS);
  call.panels = memory.take<Words>(E * all * ALL_STEPS);
  call.sums = memory.take<xsum_t>(E * all * BLOCKS);
  call.row_scales = memory.take<float>(E * all);
  call.own = memory.take<unsigned char>(threads * OWN_BYTES);
}

// Which rows are worked off at a time: by all threads, or, where there are blocks of them for every
// thread, by one, for which what it makes of them stays in its own caches.
struct Split {
  int64_t rows;  // of a block, the same for any number of threads, which results do not depend on
  bool is_apart;

  Split(int64_t m, int64_t threads) {
    constexpr int64_t HEIGHT = 2 * MANY_HEIGHTS[0];
    const int64_t least = std::max<int64_t>(1, (m + SUPER_ROWS - 1) / SUPER_ROWS);
    const int64_t even = least + least % 2, each = (m + even - 1) / even;
    rows = std::min(SUPER_ROWS, least > 1 ? (each + HEIGHT - 1) / HEIGHT * HEIGHT : m);
    is_apart = threads > 1 && least >= threads;
  }
};

}  // namespace

alignas(64) constexpr uint8_t STORED_AS[256] = {
    128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145, 146,
    147, 148, 149, 150, 151, 152, 153, 154, 155, 156, 157, 158, 159, 160, 161, 162, 163, 164, 165,
    166, 167, 168, 169, 170, 171, 172, 173, 174, 175, 176, 177, 178, 179, 180, 181, 182, 183, 184,
    185, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197, 198, 199, 200, 201, 202, 203,
    204, 205, 206, 207, 208, 209, 210, 211, 212, 213, 214, 215, 216, 217, 218, 219, 220, 221, 222,
    223, 224, 225, 226, 227, 228, 229, 230, 231, 232, 233, 234, 235, 236, 237, 238, 239, 240, 241,
    242, 243, 244, 245, 246, 247, 248, 249, 250, 251, 252, 253, 254, 255, 0, 1, 2, 3, 4, 5, 6, 7, 8,
    9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32,
    33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56,
    57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80,
    81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103,
    104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122,
    123, 124, 125, 126, 127,
};
float stored_scale(const void* const* parts, int64_t block) {
  return static_cast<const float*>(parts[1])[block];
}

extern "C" int64_t fxquant_prepared_bytes(void) { return PREPARED_BYTES; }

// Repacks a stored weight: tiles of 64 outputs, groups of PER_DWORD inputs.
extern "C" void fxquant_prepare(const void* const* parts, void* prepared, int threads) {
  const Weight w{static_cast<unsigned char*>(prepared)};
  const uint8_t* codes = static_cast<const uint8_t*>(parts[0]);
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t group = 0; group < GROUPS; ++group) {
      for (int64_t row = 0; row < TILE; ++row) {
        uint32_t word = 0;
        for (int place = 0; place < PER_DWORD; ++place) {
          const int64_t n = n0 + row, k = group * PER_DWORD + PLACES[place];
          if (n >= N || k >= K) continue;
          const int64_t element = element_of(e, n, k);
          word |= uint32_t(STORED_AS[codes[element]]) << (BITS * place);
        }
        w.codes()[(tile * GROUPS + group) * TILE + row] = word;
      }
    }
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      const int64_t at = (tile * BLOCKS + k) * TILE;
      for (int64_t row = 0; row < TILE; ++row) {
        const int64_t n = n0 + row;
        const bool inside = n < N && k * BLOCK < K;
        const int64_t block = inside ? scale_of(e, n, k) : 0;
        w.scales()[at + row] = inside ? stored_scale(parts, block) : 0.0f;
      }
    }
  }
}

extern "C" int64_t fxquant_scratch_bytes(int64_t m, int threads) {
  Memory memory{nullptr};
  Call call{};
  take_shared(call, memory, threads);
  const Split split(m, threads);
  for (int64_t thread = 0; thread < (split.is_apart ? threads : 1); ++thread)
    take_own(call, memory, split.rows, split.is_apart ? 1 : threads);
  return memory.used;
}

extern "C" void fxquant_run(void* const* prepared, const void* x, int64_t x_e, int64_t x_row,
                            int64_t x_col, int64_t m, void* const* outs, const void* const* extra,
                            void* scratch, int threads, int variant) {
  Call call{};
  for (int i = 0; i < WEIGHTS; ++i)
    call.weights[i].base = static_cast<unsigned char*>(prepared[i]);
  call.x = static_cast<const stored_t*>(x);
  call.x_e = x_e, call.x_row = x_row, call.x_col = x_col, call.m = m;
  call.out = static_cast<out_t*>(outs[0]);
  call.out1 = static_cast<float*>(outs[1]);
  call.out2 = static_cast<float*>(outs[2]);
  const uint64_t places = reinterpret_cast<uint64_t>(x) | x_e * sizeof(stored_t) |
                          x_row * sizeof(stored_t);
  call.is_line = x_col == 1 && places % sizeof(x_t) == 0;
  call.extra = extra;
  Memory memory{static_cast<unsigned char*>(scratch)};
  take_shared(call, memory, threads);
  for (int thread = 0; thread < threads; ++thread) call.turns[thread] = {};
  const bool is_few = variant == 0;
  const Split split(m, threads);
#pragma omp parallel num_threads(threads)
  {
    const Share all(omp_get_thread_num(), omp_get_num_threads(), call.turns);
    Share of = split.is_apart ? Share(0, 1) : all;
    Call own = call;
    Memory mine = memory;
    for (int64_t thread = 0; thread < (split.is_apart ? all.thread + 1 : 1); ++thread)
      take_own(own, mine, split.rows, split.is_apart ? 1 : threads);
    if (call.is_line) own.lines = const_cast<x_t*>(reinterpret_cast<const x_t*>(x));
    const int64_t blocks = m ? (m + split.rows - 1) / split.rows : 0;
    const auto work_off = [&](int64_t block, const Part& part) {
      const int64_t first = block * split.rows, rows = std::min(split.rows, m - first);
      if (is_few)
        run_few(own, first, rows, of, part);
      else
        run_many(own, first, rows, of, part);
    };
    if (split.is_apart) {
      // Of few blocks threads take a part of the outputs at a time.
      const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(4, 8 * threads / blocks));
      int64_t last = -1;
      all.each(blocks * parts, [&](int64_t item) {
        const int64_t block = item / parts;
        work_off(block, {item % parts, parts, block != last});
        last = block;
      });
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        if (block) of.wait(), of.go_on();  // for those who still read what is made anew
        work_off(block, {});
      }
    }
  }
}
