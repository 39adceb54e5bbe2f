// Of the activation, packed, and of the result.

namespace {

// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  Weight weights[WEIGHTS];
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  float* out1;  // [e, m, n], in float32
  float* out2;  // [e, m, n], in float32
  const void* const* extra;

  Turn* turns;  // how far each thread is with its part
  x_t* lines;  // [e][row][step]
  Words* panels;  // [e][panel][step][row of it]
  xsum_t* sums;  // [e][panel][block][row of it]: sums of the activation
  float* row_scales;  // [e][row]
  unsigned char* own;  // of each thread
  bool is_line;  // rows are lines as they are
};

// A row on its way to the second-level cache: what is read row by row would wait for each of them.
INLINE void ask_ahead(const stored_t* row) {
  constexpr int64_t OF_LINE = 64 / sizeof(stored_t);
  for (int64_t k = 0; k < K; k += OF_LINE) __builtin_prefetch(row + k, 0, 2);
}

// The sums of a line's blocks.
INLINE void sum_blocks(const int8_t* line, xsum_t* sums, int height) {
  for (int64_t block = 0; block < BLOCKS; ++block) {
    const int64_t last = std::min((block + 1) * BLOCK, K_PADDED);
    xsum_t sum = 0;
    for (int64_t k = block * BLOCK; k < last; ++k) sum += line[k];
    sums[block * height] = sum * -BYTE_BIAS;
  }
}

// A row as a line; its sums are a panel's height apart.
INLINE void line_of(const stored_t* x, int64_t x_col, x_t* line, xsum_t* sums, int height) {
  int8_t* q = reinterpret_cast<int8_t*>(line);
  for (int64_t k = 0; k < K; ++k) q[k] = x[k * x_col];
  std::memset(q + K, 0, K_PADDED - K);
  sum_blocks(q, sums, height);
}

void line_of(const Call& call, const stored_t* x, x_t* line, xsum_t* sums, int height) {
  // With the stride a constant the usual case becomes vector instructions.
  if (call.x_col == 1) return line_of(x, 1, line, sums, height);
  line_of(x, call.x_col, line, sums, height);
}

// Makes the line of a row under work, the item-th of all matrices, and what else is kept of it.
template <int COUNT>
INLINE void make_line(const Call& call, int64_t super_first, int64_t rows, int64_t item,
                      const int (&heights)[COUNT], bool is_last, x_t* line) {
  const int64_t e = item / rows, row = item % rows;
  const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
  if (call.x_col == 1 && !is_last) ask_ahead(x + call.x_row);
  const int64_t panel_row = row / heights[0] * heights[0];
  xsum_t* sums = call.sums + (e * padded(rows, heights) + panel_row) * BLOCKS + (row - panel_row);
  const int height = height_of(rows - panel_row, heights);
  const float* amax = static_cast<const float*>(call.extra[OPERANDS]);
  call.row_scales[item] = amax[e * call.m + super_first + row] / 127.0f;
  if (call.is_line)
    sum_blocks(x, sums, height);
  else
    line_of(call, x, line, sums, height);
}

// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
  const auto mine = of.part(E * rows);
  for (int64_t item = mine.first; item < mine.last; ++item)
    make_line(call, super_first, rows, item, heights, item + 1 == mine.last,
              call.lines + item * ALL_STEPS);
  of.wait();
  const int64_t all = padded(rows, heights), panels = panels_of(rows, heights);
  const int64_t parts = panels < of.threads ? of.threads : 1;
  for (int64_t item = of.thread; item < E * panels * parts; item += of.threads) {
    const int64_t e = item / parts / panels, panel_row = item / parts % panels * heights[0];
    const auto part = Share(item % parts, parts).part(ALL_STEPS / 16);
    const int height = height_of(rows - panel_row, heights);
    const x_t* lines[MOST_ROWS];
    for (int row = 0; row < height; ++row) {
      const int64_t line = std::min<int64_t>(panel_row + row, rows - 1);
      lines[row] = call.lines + (e * rows + line) * ALL_STEPS;
      if (call.is_line)
        lines[row] = reinterpret_cast<const x_t*>(call.x + e * call.x_e +
                                                  (super_first + line) * call.x_row);
    }
    Words* panel = call.panels + (e * all + panel_row) * ALL_STEPS;
    // A cache line of a row at a time: rows are often apart by what evicts each other.
    for (int64_t first = part.first * 16; first < part.last * 16; first += 16)
      for (int row = 0; row < height; ++row)
        for (int64_t step = first; step < first + 16; ++step)
          panel[step * height + row] = words_of(lines[row][step]);
  }
  of.wait();
}

// The rows from panel_row on of the rows that are under work, which start at super_first. The
// totals of each further weight lie apart.
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals, int64_t apart) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  const float* row_scales = call.row_scales + e * all_rows + panel_row;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    const float *sums = totals + row * TILE, *sums1 = sums + apart, *sums2 = sums1 + apart;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, sums, sums1, sums2, row_scales[row]);
    else
      finish_row(call, e, at, n0, N - n0, sums, sums1, sums2, row_scales[row]);
  }
}

}  // namespace
