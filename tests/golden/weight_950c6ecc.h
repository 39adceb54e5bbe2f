// The repacked weight and its scales.

namespace {

using x_t = uint32_t;  // the activation, as products take it
using operand_t = uint32_t;  // the weight, as products take it
using sum_t = vi;  // what products are summed in
using xsum_t = int32_t;
constexpr int STEPS = 1;  // instructions that use up a group
constexpr int MOST_SUMS = 10;  // registers of sums
constexpr int SUMS_AT_ONCE = 4;  // of them, without those for turns
constexpr int PLACES[4] = {0, 1, 2, 3};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 8;  // of a panel
constexpr int FEW_HEIGHTS[5] = {8, 4, 3, 2, 1};  // of panels, in rows
constexpr int MANY_HEIGHTS[3] = {6, 4, 2};  // of panels, in rows
constexpr int BYTE_BIAS = 128;  // makes bytes of the weight unsigned
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = (N + TILE - 1) / TILE;
constexpr int64_t K_PADDED = (K + TILE - 1) / TILE * TILE;  // inputs, up to whole tiles
constexpr int64_t BITS = 8;  // of a code
constexpr int64_t PER_DWORD = 4;  // codes in a dword: the inputs of a group
constexpr int64_t PER_STEP = 4;  // inputs that one instruction multiplies
constexpr int64_t GROUPS = K_PADDED / PER_DWORD;  // in a row
constexpr int64_t ALL_STEPS = K_PADDED / PER_STEP;  // instructions for a row
constexpr int64_t BLOCKS = (K_PADDED + BLOCK - 1) / BLOCK;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = BLOCK / PER_DWORD;
constexpr int64_t GROUPS_AT_ONCE = 64;  // that few rows go through before the next
constexpr int64_t GROUPS_OF_CHUNK = CHUNK / PER_DWORD;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = (K_PADDED + CHUNK - 1) / CHUNK;  // in a row
constexpr int64_t TOTALS = (SUPER_ROWS + MANY_HEIGHTS[0]) * TILE;  // floats of one weight's sums
constexpr int64_t NEAR_TOTALS = 8192;  // the same that few rows make before they are read
constexpr int64_t DECODED = 0;  // dwords of a decoded chunk
constexpr int64_t OWN_BYTES = 4 * (DECODED + WEIGHTS * TOTALS);  // a thread

// Where the arrays of a repacked weight start, in bytes: each in a cache line of its own.
constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
constexpr int64_t CODES_AT = 0;
constexpr int64_t SCALES_AT = CODES_AT + whole_lines(4 * E * N_TILES * GROUPS * TILE);
constexpr int64_t PREPARED_BYTES = SCALES_AT + whole_lines(4 * E * N_TILES * BLOCKS * TILE);

struct Weight {
  unsigned char* base;

  template <typename T> T* at(int64_t start) const { return reinterpret_cast<T*>(base + start); }
  uint32_t* codes() const { return at<uint32_t>(CODES_AT); }
  float* scales() const { return at<float>(SCALES_AT); }
};

struct Scales {
  const Weight& w;
  const int64_t tile;  // number of the tile, all batches counted

  Scales(const Weight& w, int64_t tile) : w(w), tile(tile) {}
  const float* at(int64_t block) { return w.scales() + (tile * BLOCKS + block) * TILE; }
};

}  // namespace
