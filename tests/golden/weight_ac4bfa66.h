// The repacked weight and its scales.

namespace {

using x_t = float;  // the activation, as products take it
using operand_t = float;  // the weight, as products take it
using sum_t = vf;  // what products are summed in
using xsum_t = float;
constexpr int STEPS = 8;  // instructions that use up a group
constexpr int MOST_SUMS = 10;  // registers of sums
constexpr int SUMS_AT_ONCE = 4;  // of them, without those for turns
constexpr int PLACES[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 8;  // of a panel
constexpr int FEW_HEIGHTS[5] = {8, 4, 3, 2, 1};  // of panels, in rows
constexpr int MANY_HEIGHTS[3] = {6, 4, 2};  // of panels, in rows
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = (N + TILE - 1) / TILE;
constexpr int64_t K_PADDED = (K + TILE - 1) / TILE * TILE;  // inputs, up to whole tiles
constexpr int64_t BITS = 4;  // of a code
constexpr int64_t PER_DWORD = 8;  // codes in a dword: the inputs of a group
constexpr int64_t PER_STEP = 1;  // inputs that one instruction multiplies
constexpr int64_t GROUPS = K_PADDED / PER_DWORD;  // in a row
constexpr int64_t ALL_STEPS = K_PADDED / PER_STEP;  // instructions for a row
constexpr int64_t BLOCKS = (K_PADDED + BLOCK - 1) / BLOCK;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = BLOCK / PER_DWORD;
constexpr int64_t GROUPS_AT_ONCE = 32;  // that few rows go through before the next
constexpr int64_t BLOCKS_AT_ONCE = 1;  // whose scales stand side by side
constexpr int64_t GROUPS_OF_CHUNK = CHUNK / PER_DWORD;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = (K_PADDED + CHUNK - 1) / CHUNK;  // in a row
constexpr int64_t TOTALS = (SUPER_ROWS + MANY_HEIGHTS[0]) * TILE;  // floats of one weight's sums
constexpr int64_t DECODED = CHUNK / PER_STEP * TILE;  // dwords of a decoded chunk
constexpr int64_t OWN_BYTES = 4 * (DECODED + TOTALS);  // a thread
constexpr int64_t AHEAD = 2048;  // dwords of codes that are asked for in advance

// Where the arrays of a repacked weight start, in bytes: each in a cache line of its own.
constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
constexpr int64_t CODES_AT = 0;
constexpr int64_t SCALE_CODES_AT = CODES_AT + whole_lines(4 * E * N_TILES * GROUPS * TILE);
constexpr int64_t CHANGES_AT = SCALE_CODES_AT + whole_lines(E * N_TILES * BLOCKS * TILE);
constexpr int64_t FIRST_NESTED_AT = CHANGES_AT + whole_lines(8 * E * N_TILES * BLOCKS);
constexpr int64_t NESTED_AT = FIRST_NESTED_AT + whole_lines(4 * E * N_TILES * TILE);
constexpr int64_t OFFSET_AT = NESTED_AT + whole_lines(4 * NESTED);
constexpr int64_t PREPARED_BYTES = OFFSET_AT + whole_lines(4);

struct Weight {
  unsigned char* base;

  template <typename T> T* at(int64_t start) const { return reinterpret_cast<T*>(base + start); }
  uint32_t* codes() const { return at<uint32_t>(CODES_AT); }
  uint8_t* scale_codes() const { return at<uint8_t>(SCALE_CODES_AT); }
  uint64_t* changes() const { return at<uint64_t>(CHANGES_AT); }
  float* first_nested() const { return at<float>(FIRST_NESTED_AT); }
  float* nested() const { return at<float>(NESTED_AT); }
  float* offset() const { return at<float>(OFFSET_AT); }
};

alignas(64) constexpr float SCALE_LEVELS[256] = {
    -0.99296874f, -0.9789063f, -0.96484375f, -0.9507812f, -0.93671876f, -0.92265624f, -0.9085938f,
    -0.89453125f, -0.8804687f, -0.86640626f, -0.85234374f, -0.8382813f, -0.82421875f, -0.8101562f,
    -0.79609376f, -0.78203124f, -0.7679688f, -0.75390625f, -0.7398437f, -0.72578126f, -0.7117188f,
    -0.6976563f, -0.68359375f, -0.6695312f, -0.65546876f, -0.6414063f, -0.6273438f, -0.61328125f,
    -0.5992187f, -0.58515626f, -0.5710938f, -0.5570313f, -0.54296875f, -0.5289062f, -0.5148437f,
    -0.50078124f, -0.4867187f, -0.47265625f, -0.45859373f, -0.44453126f, -0.43046874f, -0.41640624f,
    -0.40234375f, -0.38828123f, -0.37421876f, -0.36015624f, -0.34609374f, -0.33203125f,
    -0.31796873f, -0.30390626f, -0.28984374f, -0.27578127f, -0.26171875f, -0.24765624f,
    -0.23359375f, -0.21953125f, -0.20546874f, -0.19140625f, -0.17734376f, -0.16328125f,
    -0.14921875f, -0.13515624f, -0.12109375f, -0.107031256f, -0.09859375f, -0.09578126f,
    -0.092968754f, -0.09015625f, -0.08734375f, -0.08453125f, -0.08171876f, -0.07890625f,
    -0.07609375f, -0.07328125f, -0.070468746f, -0.067656256f, -0.06484375f, -0.06203125f,
    -0.059218753f, -0.05640625f, -0.05359375f, -0.05078125f, -0.04796875f, -0.04515625f,
    -0.042343747f, -0.03953125f, -0.036718752f, -0.03390625f, -0.03109375f, -0.028281251f,
    -0.02546875f, -0.02265625f, -0.019843752f, -0.01703125f, -0.01421875f, -0.01140625f,
    -0.00971875f, -0.009156249f, -0.00859375f, -0.00803125f, -0.00746875f, -0.00690625f,
    -0.00634375f, -0.00578125f, -0.0052187503f, -0.0046562497f, -0.00409375f, -0.0035312497f,
    -0.00296875f, -0.00240625f, -0.00184375f, -0.0012812499f, -0.0009437501f, -0.00083125f,
    -0.00071875006f, -0.0006062501f, -0.00049375003f, -0.00038125002f, -0.00026875004f,
    -0.00015625001f, -8.875e-05f, -6.625e-05f, -4.375e-05f, -2.1249998e-05f, -7.75e-06f,
    -3.2500002e-06f, -5.5000004e-07f, 0.0f, 5.5000004e-07f, 3.2500002e-06f, 7.75e-06f,
    2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f, 0.00015625001f, 0.00026875004f,
    0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f, 0.00083125f, 0.0009437501f,
    0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f, 0.0046562497f,
    0.0052187503f, 0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f, 0.00859375f,
    0.009156249f, 0.00971875f, 0.01140625f, 0.01421875f, 0.01703125f, 0.019843752f, 0.02265625f,
    0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f, 0.036718752f, 0.03953125f, 0.042343747f,
    0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f, 0.059218753f, 0.06203125f,
    0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f, 0.07890625f, 0.08171876f,
    0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f, 0.107031256f,
    0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734376f, 0.19140625f, 0.20546874f,
    0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f, 0.28984374f, 0.30390626f,
    0.31796873f, 0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f, 0.40234375f,
    0.41640624f, 0.43046874f, 0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f,
    0.5148437f, 0.5289062f, 0.54296875f, 0.5570313f, 0.5710938f, 0.58515626f, 0.5992187f,
    0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, 0.68359375f, 0.6976563f,
    0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, 0.79609376f,
    0.8101562f, 0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f,
    0.9085938f, 0.92265624f, 0.93671876f, 0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f, 1.0f,
};
struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted
  alignas(64) float nested[TILE], scales[BLOCKS_AT_ONCE * TILE];

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {
    std::memcpy(nested, w.first_nested() + tile * TILE, sizeof nested);
  }

  // Blocks are entered in order, from the first.
  INLINE void enter(int64_t block) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (uint64_t left = w.changes()[tile * BLOCKS + block]; left; left &= left - 1) {
      const int64_t row = __builtin_ctzll(left);
      nested[row] = w.nested()[nested_of(e, n0 + row, block)];
    }
  }

  // Where BLOCKS_AT_ONCE of them stand side by side.
  ALONE const float* at(int64_t block) {
    enter(block);
    float* scale = scales + block % BLOCKS_AT_ONCE * TILE;
    const uint8_t* codes = w.scale_codes() + (tile * BLOCKS + block) * TILE;
    // Left to itself GCC takes codes out of vectors one by one.
    const auto level = [&](int i) INLINE_LAMBDA { return SCALE_LEVELS[codes[i]]; };
    for (int i = 0; i < TILE; i += LANES) {
      vf x = _mm256_setr_ps(level(i), level(i + 1), level(i + 2), level(i + 3), level(i + 4),
                            level(i + 5), level(i + 6), level(i + 7));
      x = mul(x, load(nested + i));
      x = add(x, spread(w.offset()[0]));
      store(scale + i, x);
    }
    return scale;
  }
};

}  // namespace
