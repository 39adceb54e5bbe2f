// Calls a printed kernel that rounds rows on memory of exactly the sizes it is promised.
//
// Arguments: the file of x, rows, bytes of a row's codes, the strides of x, threads, the limit, and
// the file to which codes, amax and how many numbers saturated are written, one after the other.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int64_t fxquant_quantize(const void* x, int64_t x_row, int64_t x_col, int64_t m,
                                    const float* limit, void* codes, float* amax, int threads);

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  if (!file) return 3;
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  void* x = std::malloc(bytes.size());
  std::memcpy(x, bytes.data(), bytes.size());
  const int64_t rows = std::atoll(arguments[2]), k = std::atoll(arguments[3]);
  const int64_t x_row = std::atoll(arguments[4]), x_col = std::atoll(arguments[5]);
  char* codes = static_cast<char*>(std::malloc(rows * k));
  char* amax = static_cast<char*>(std::malloc(rows * sizeof(float)));
  float* limit = static_cast<float*>(std::malloc(sizeof(float)));
  *limit = std::strtof(arguments[7], nullptr);
  const int64_t saturated = fxquant_quantize(x, x_row, x_col, rows, limit, codes,
                                             reinterpret_cast<float*>(amax),
                                             std::atoi(arguments[6]));
  std::ofstream(arguments[8], std::ios::binary)
      .write(codes, rows * k)
      .write(amax, rows * sizeof(float))
      .write(reinterpret_cast<const char*>(&saturated), sizeof saturated);
  std::free(x);
  for (void* memory : {static_cast<void*>(codes), static_cast<void*>(amax),
                       static_cast<void*>(limit)})
    std::free(memory);
}
