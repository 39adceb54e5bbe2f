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
  call.panels = memory.take<x_t>(E * all * ALL_STEPS);
  call.sums = memory.take<xsum_t>(0);
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
          word |= uint32_t(codes[element / 2] >> (4 - 4 * (element % 2)) & 15) << (BITS * place);
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
        w.scale_codes()[at + row] =
              inside ? static_cast<const uint8_t*>(parts[1])[block] : 0;
      }
    }
  }
  std::memcpy(w.nested(), parts[2], NESTED * sizeof(float));
  for (int64_t tile = 0; tile < E * N_TILES; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t row = 0; row < TILE; ++row) {
      const int64_t n = std::min(n0 + row, N - 1);
      w.first_nested()[tile * TILE + row] = w.nested()[nested_of(e, n, 0)];
    }
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      uint64_t changes = 0;
      for (int64_t row = 0; k && k * BLOCK < K && row < TILE && n0 + row < N; ++row) {
        const int64_t n = n0 + row;
        const bool moved = nested_of(e, n, k) != nested_of(e, n, k - 1);
        changes |= uint64_t(moved) << row;
      }
      w.changes()[tile * BLOCKS + k] = changes;
    }
  }
  w.offset()[0] = *static_cast<const float*>(parts[3]);
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

extern "C" void fxquant_run(const void* prepared, const void* x, int64_t x_e, int64_t x_row,
                            int64_t x_col, int64_t m, void* out, const void* const* extra,
                            void* scratch, int threads, int variant) {
  Call call{};
  call.weight.base = static_cast<unsigned char*>(const_cast<void*>(prepared));
  call.x = static_cast<const stored_t*>(x);
  call.x_e = x_e, call.x_row = x_row, call.x_col = x_col, call.m = m;
  call.out = static_cast<out_t*>(out);
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
    if (is_few && m == 1) own.panels = own.lines;  // a panel of one row is a line
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
