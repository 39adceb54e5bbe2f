// Of the activation, packed, and of the result.

namespace {

INLINE float x_of(stored_t x) { return from_bf16(x); }

// One call: its operands, and what is made of the activation in scratch memory.
struct Call {
  Weight weight;
  const stored_t* x;  // [e, m, k] with these strides
  int64_t x_e, x_row, x_col, m;
  out_t* out;  // [e, m, n]
  const void* const* extra;

  Turn* turns;  // how far each thread is with its part
  x_t* lines;  // [e][row][step]
  x_t* panels;  // [e][panel][step][row of it]
  xsum_t* sums;  // none are needed
  unsigned char* own;  // of each thread
};

// A row on its way to the second-level cache: what is read row by row would wait for each of them.
INLINE void ask_ahead(const stored_t* row) {
  constexpr int64_t OF_LINE = 64 / sizeof(stored_t);
  for (int64_t k = 0; k < K; k += OF_LINE) __builtin_prefetch(row + k, 0, 2);
}

// A row as a line.
INLINE void line_of(const stored_t* x, int64_t x_col, x_t* line) {
  for (int64_t k = 0; k < K; ++k) line[k] = x_of(x[k * x_col]);
  for (int64_t k = K; k < K_PADDED; ++k) line[k] = 0;
}

void line_of(const Call& call, const stored_t* x, x_t* line) {
  // With the stride a constant the usual case becomes vector instructions.
  if (call.x_col == 1) return line_of(x, 1, line);
  line_of(x, call.x_col, line);
}

// Makes the line of a row under work, the item-th of all matrices, and what else is kept of it.
template <int COUNT>
INLINE void make_line(const Call& call, int64_t super_first, int64_t rows, int64_t item,
                      const int (&heights)[COUNT], bool is_last, x_t* line) {
  const int64_t e = item / rows, row = item % rows;
  const stored_t* x = call.x + e * call.x_e + (super_first + row) * call.x_row;
  if (call.x_col == 1 && !is_last) ask_ahead(x + call.x_row);
  line_of(call, x, line);
}

// Panels of the rows that are under work; every thread makes some.
template <int COUNT>
void pack(const Call& call, int64_t super_first, int64_t rows, const int (&heights)[COUNT],
          const Share& of) {
  const bool is_single = call.m == 1 && height_of(1, heights) == 1;
  const auto mine = of.part(E * rows);
  for (int64_t item = mine.first; item < mine.last; ++item)
    make_line(call, super_first, rows, item, heights, item + 1 == mine.last,
              call.lines + item * ALL_STEPS);
  of.wait();
  if (is_single) return;
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
    }
    x_t* panel = call.panels + (e * all + panel_row) * ALL_STEPS;
    // A cache line of a row at a time: rows are often apart by what evicts each other.
    for (int64_t first = part.first * 16; first < part.last * 16; first += 16)
      for (int row = 0; row < height; ++row)
        for (int64_t step = first; step < first + 16; ++step)
          panel[step * height + row] = lines[row][step];
  }
  of.wait();
}

// The rows from panel_row on of the rows that are under work, which start at super_first.
void finish(const Call& call, int64_t tile, int64_t super_first, int64_t panel_row, int64_t rows,
            int64_t all_rows, float* totals) {
  const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = super_first + panel_row + row;
    const float* sums = totals + row * TILE;
    if (N - n0 >= TILE)
      finish_row(call, e, at, n0, TILE, sums);
    else
      finish_row(call, e, at, n0, N - n0, sums);
  }
}

}  // namespace
