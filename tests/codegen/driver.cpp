// Calls a printed kernel on memory of exactly the sizes it is promised, for the sanitizers.
//
// It is linked with the kernel. The first argument is a folder: "parts" holds the names of the
// stored weight's files, and "calls" a line a call: rows, variant, threads, the strides of x, bytes
// of the result, its file, x and the operands.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
int64_t fxquant_prepared_bytes(void);
void fxquant_prepare(const void* const* parts, void* prepared, int threads);
int64_t fxquant_scratch_bytes(int64_t m, int threads);
void fxquant_run(const void* prepared, const void* x, int64_t x_e, int64_t x_row, int64_t x_col,
                 int64_t m, void* out, const void* const* extra, void* scratch, int threads,
                 int variant);
}

static std::string folder;

// A file's bytes in memory that ends where they do.
static void* contents(const std::string& name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  if (!file) std::exit(3);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  void* memory = std::malloc(bytes.size());
  std::memcpy(memory, bytes.data(), bytes.size());
  return memory;
}

static void* aligned(int64_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size ? size : 1)) std::exit(4);
  std::memset(memory, 0xff, size);
  return memory;
}

int main(int, char** arguments) {
  folder = arguments[1];
  std::ifstream names(folder + "/parts");
  std::vector<void*> parts;
  for (std::string name; names >> name;) parts.push_back(contents(name));

  std::ifstream calls(folder + "/calls");
  for (std::string line; std::getline(calls, line);) {
    std::istringstream fields(line);
    int64_t rows, x_e, x_row, x_col, bytes;
    int variant, threads;
    std::string out_name, name;
    fields >> rows >> variant >> threads >> x_e >> x_row >> x_col >> bytes >> out_name >> name;
    void* x = contents(name);
    std::vector<void*> extra;
    while (fields >> name) extra.push_back(contents(name));
    void* prepared = aligned(fxquant_prepared_bytes());
    fxquant_prepare(parts.data(), prepared, threads);
    void* scratch = aligned(fxquant_scratch_bytes(rows, threads));
    void* out = std::malloc(bytes);
    fxquant_run(prepared, x, x_e, x_row, x_col, rows, out, extra.data(), scratch, threads, variant);
    std::ofstream(folder + "/" + out_name, std::ios::binary)
        .write(static_cast<const char*>(out), bytes);
    for (void* memory : extra) std::free(memory);
    for (void* memory : {x, prepared, scratch, out}) std::free(memory);
  }
  for (void* memory : parts) std::free(memory);
}
