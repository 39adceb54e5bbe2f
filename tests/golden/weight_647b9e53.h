// The repacked weight and its scales.

namespace {

using x_t = uint32_t;  // the activation, as products take it
using sum_t = vf;  // what products are summed in
using sum_of_one_t = float;  // a lane's sum
using xsum_t = float;
typedef uint16_t half_t __attribute__((may_alias));  // bfloat16, read in pairs
constexpr int STEPS = 4;  // instructions that use up a group
constexpr int MOST_SUMS = 24;  // registers of sums
constexpr int SUMS_AT_ONCE = 24;  // of them, without those for turns
constexpr int PLACES[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a dword: whose codes stand there
constexpr int MOST_ROWS = 16;  // of a panel
constexpr int FEW_HEIGHTS[1] = {1};  // of panels, in rows
// of panels, in rows
constexpr int MANY_HEIGHTS[16] = {16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1};
constexpr int64_t TILE = 64;  // outputs that are worked on together
constexpr int64_t N_TILES = (N + TILE - 1) / TILE;
constexpr int64_t K_PADDED = (K + TILE - 1) / TILE * TILE;  // inputs, up to whole tiles
constexpr int64_t BITS = 4;  // of a code
constexpr int64_t PER_DWORD = 8;  // codes in a dword: the inputs of a group
constexpr int64_t PER_STEP = 2;  // inputs that one instruction multiplies
constexpr int64_t GROUPS = K_PADDED / PER_DWORD;  // in a row
constexpr int64_t ALL_STEPS = K_PADDED / PER_STEP;  // instructions for a row
constexpr int64_t BLOCKS = (K_PADDED + BLOCK - 1) / BLOCK;  // in a row
constexpr int64_t GROUPS_OF_BLOCK = BLOCK / PER_DWORD;
constexpr int64_t GROUPS_AT_ONCE = 32;  // that few rows go through before the next
constexpr int64_t BLOCKS_AT_ONCE = 2;  // whose scales stand side by side
constexpr int64_t GROUPS_OF_CHUNK = CHUNK / PER_DWORD;  // that are decoded at a time for many rows
constexpr int64_t CHUNKS = (K_PADDED + CHUNK - 1) / CHUNK;  // in a row
constexpr int64_t SPAN_ROWS = 64;  // up to which sums are scaled
constexpr int64_t TOTALS = (SUPER_ROWS + MANY_HEIGHTS[0]) * TILE;  // floats of one weight's sums
constexpr int64_t NEAR_TOTALS = 8192;  // the same that few rows make before they are read
constexpr int64_t DECODED = CHUNK / PER_STEP * TILE;  // dwords of a decoded chunk
constexpr int64_t OWN_BYTES = 4 * (DECODED + WEIGHTS * TOTALS);  // a thread
constexpr int64_t AHEAD = 2048;  // dwords of codes that are asked for in advance
constexpr int64_t NEAR = 512;  // the same, into the first-level cache

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

alignas(64) constexpr uint8_t SCALE_LEVELS[4][256] = {
    {
        51, 154, 0, 102, 205, 51, 154, 0, 102, 205, 51, 154, 0, 102, 205, 51,
        154, 0, 102, 205, 52, 154, 0, 102, 205, 52, 154, 0, 102, 205, 52, 154,
        0, 102, 204, 51, 50, 0, 204, 154, 102, 51, 0, 204, 154, 102, 51, 0,
        204, 154, 102, 52, 0, 153, 51, 205, 102, 0, 154, 51, 205, 102, 0, 52,
        133, 247, 103, 215, 72, 184, 42, 154, 10, 123, 235, 93, 205, 123, 93, 61,
        31, 0, 225, 195, 163, 133, 103, 72, 82, 21, 215, 154, 93, 31, 195, 72,
        100, 24, 205, 129, 106, 211, 59, 164, 13, 116, 221, 138, 92, 45, 252, 157,
        255, 62, 128, 193, 1, 131, 5, 11, 75, 179, 52, 6, 255, 148, 183, 0,
        183, 148, 255, 6, 52, 179, 75, 11, 5, 131, 1, 193, 128, 62, 255, 157,
        252, 45, 92, 138, 221, 116, 13, 164, 59, 211, 106, 129, 205, 24, 100, 72,
        195, 31, 93, 154, 215, 21, 82, 72, 103, 133, 163, 195, 225, 0, 31, 61,
        93, 123, 205, 93, 235, 123, 10, 154, 42, 184, 72, 215, 103, 247, 133, 52,
        0, 102, 205, 51, 154, 0, 102, 205, 51, 153, 0, 52, 102, 154, 204, 0,
        51, 102, 154, 204, 0, 51, 102, 154, 204, 0, 50, 51, 204, 102, 0, 154,
        52, 205, 102, 0, 154, 52, 205, 102, 0, 154, 52, 205, 102, 0, 154, 51,
        205, 102, 0, 154, 51, 205, 102, 0, 154, 51, 205, 102, 0, 154, 51, 0,
    },
    {
        51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51,
        153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 102, 204, 51, 153,
        0, 102, 204, 51, 51, 0, 204, 153, 102, 51, 0, 204, 153, 102, 51, 0,
        204, 153, 102, 51, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 51,
        235, 40, 102, 163, 225, 30, 92, 153, 215, 20, 81, 143, 204, 20, 143, 10,
        133, 0, 122, 245, 112, 235, 102, 225, 184, 174, 163, 153, 143, 133, 245, 225,
        59, 4, 204, 149, 188, 77, 223, 112, 2, 147, 36, 108, 143, 178, 169, 239,
        101, 232, 106, 236, 111, 226, 231, 215, 31, 239, 128, 66, 5, 26, 163, 0,
        163, 26, 5, 66, 128, 239, 31, 215, 231, 226, 111, 236, 106, 232, 101, 239,
        169, 178, 143, 108, 36, 147, 2, 112, 223, 77, 188, 149, 204, 4, 59, 225,
        245, 133, 143, 153, 163, 174, 184, 225, 102, 235, 112, 245, 122, 0, 133, 10,
        143, 20, 204, 143, 81, 20, 215, 153, 92, 30, 225, 163, 102, 40, 235, 51,
        0, 102, 204, 51, 153, 0, 102, 204, 51, 153, 0, 51, 102, 153, 204, 0,
        51, 102, 153, 204, 0, 51, 102, 153, 204, 0, 51, 51, 204, 102, 0, 153,
        51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51,
        204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 204, 102, 0, 153, 51, 0,
    },
    {
        126, 122, 119, 115, 111, 108, 104, 101, 97, 93, 90, 86, 83, 79, 75, 72,
        68, 65, 61, 57, 54, 50, 47, 43, 39, 36, 32, 29, 25, 21, 18, 14,
        11, 7, 3, 0, 249, 242, 234, 227, 220, 213, 206, 198, 191, 184, 177, 170,
        162, 155, 148, 141, 134, 125, 111, 96, 82, 68, 53, 39, 24, 10, 248, 219,
        201, 196, 190, 184, 178, 173, 167, 161, 155, 150, 144, 138, 132, 126, 114, 103,
        91, 80, 68, 56, 45, 33, 22, 10, 254, 231, 208, 185, 162, 139, 104, 58,
        31, 22, 12, 3, 244, 226, 207, 189, 171, 152, 134, 103, 66, 29, 241, 167,
        119, 89, 60, 30, 1, 199, 140, 35, 186, 138, 55, 178, 2, 90, 19, 0,
        19, 90, 2, 178, 55, 138, 186, 35, 140, 199, 1, 30, 60, 89, 119, 167,
        241, 29, 66, 103, 134, 152, 171, 189, 207, 226, 244, 3, 12, 22, 31, 58,
        104, 139, 162, 185, 208, 231, 254, 10, 22, 33, 45, 56, 68, 80, 91, 103,
        114, 126, 132, 138, 144, 150, 155, 161, 167, 173, 178, 184, 190, 196, 201, 219,
        248, 10, 24, 39, 53, 68, 82, 96, 111, 125, 134, 141, 148, 155, 162, 170,
        177, 184, 191, 198, 206, 213, 220, 227, 234, 242, 249, 0, 3, 7, 11, 14,
        18, 21, 25, 29, 32, 36, 39, 43, 47, 50, 54, 57, 61, 65, 68, 72,
        75, 79, 83, 86, 90, 93, 97, 101, 104, 108, 111, 115, 119, 122, 126, 128,
    },
    {
        191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191,
        191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191, 191,
        191, 191, 191, 191, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190,
        190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 190, 189, 189,
        189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189, 189,
        189, 189, 189, 189, 189, 189, 189, 189, 188, 188, 188, 188, 188, 188, 188, 188,
        188, 188, 188, 188, 187, 187, 187, 187, 187, 187, 187, 187, 187, 187, 186, 186,
        186, 186, 186, 186, 186, 185, 185, 185, 184, 184, 184, 183, 183, 182, 181, 0,
        53, 54, 55, 55, 56, 56, 56, 57, 57, 57, 58, 58, 58, 58, 58, 58,
        58, 59, 59, 59, 59, 59, 59, 59, 59, 59, 59, 60, 60, 60, 60, 60,
        60, 60, 60, 60, 60, 60, 60, 61, 61, 61, 61, 61, 61, 61, 61, 61,
        61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61,
        61, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62,
        62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 62, 63, 63, 63, 63, 63,
        63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
        63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    },
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
    const vi code = _mm512_loadu_si512(codes);
    const __mmask64 upper = _mm512_movepi8_mask(code);
    vi byte[4];
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const uint8_t* table = SCALE_LEVELS[plane];
      const vi t0 = _mm512_load_si512(table), t1 = _mm512_load_si512(table + 64);
      const vi t2 = _mm512_load_si512(table + 128), t3 = _mm512_load_si512(table + 192);
      const vi low = _mm512_permutex2var_epi8(t0, code, t1);
      byte[plane] =
          _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(t2, code, t3));
    }
    const vi a = _mm512_unpacklo_epi8(byte[0], byte[1]), b = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const vi c = _mm512_unpacklo_epi8(byte[2], byte[3]), d = _mm512_unpackhi_epi8(byte[2], byte[3]);
    const vi word[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                        _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vf x = mul(_mm512_castsi512_ps(word[i]), load(nested + 16 * i));
      x = add(x, spread(w.offset()[0]));
      store(scale + 16 * i, x);
    }
    return scale;
  }
};

}  // namespace
