// Calls a printed kernel that makes rows on memory of exactly the sizes it is promised.
//
// Arguments: a folder with the operands in0, in1 .., rows, bytes of a row's codes, threads, the
// limit, the file to which codes, amax and further results are written, the number of operands, the
// steps between their rows, and the bytes of one number of every further result.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int64_t fxquant_rows(const void* const* operands, const int64_t* steps, int64_t m,
                                const float* limit, void* codes, float* amax, void* const* more,
                                int threads);

int main(int count, char** arguments) {
  const int64_t rows = std::atoll(arguments[2]), k = std::atoll(arguments[3]);
  const int n_operands = std::atoi(arguments[7]);
  std::vector<void*> operands, more;
  std::vector<int64_t> steps, sizes;
  for (int i = 0; i < n_operands; ++i) {
    std::ifstream file(arguments[1] + ("/in" + std::to_string(i)), std::ios::binary);
    if (!file) return 3;
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    operands.push_back(std::malloc(bytes.size()));
    std::memcpy(operands.back(), bytes.data(), bytes.size());
    steps.push_back(std::atoll(arguments[8 + i]));
  }
  for (int i = 8 + n_operands; i < count; ++i) {
    sizes.push_back(rows * k * std::atoll(arguments[i]));
    more.push_back(std::malloc(sizes.back()));
  }
  char* codes = static_cast<char*>(std::malloc(rows * k));
  char* amax = static_cast<char*>(std::malloc(rows * sizeof(float)));
  float* limit = static_cast<float*>(std::malloc(sizeof(float)));
  *limit = std::strtof(arguments[5], nullptr);
  fxquant_rows(operands.data(), steps.data(), rows, limit, codes, reinterpret_cast<float*>(amax),
               more.data(), std::atoi(arguments[4]));
  std::ofstream out(arguments[6], std::ios::binary);
  out.write(codes, rows * k).write(amax, rows * sizeof(float));
  for (size_t i = 0; i < more.size(); ++i) out.write(static_cast<char*>(more[i]), sizes[i]);
  for (void* memory : operands) std::free(memory);
  for (void* memory : more) std::free(memory);
  for (void* memory : {static_cast<void*>(codes), static_cast<void*>(amax),
                       static_cast<void*>(limit)})
    std::free(memory);
}
