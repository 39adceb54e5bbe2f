// Calls a printed kernel on memory of exactly the sizes it is promised, for the sanitizers.
//
// It is linked with the kernel. The first argument is a folder: "parts" holds the names of the
// stored weight's files, a line for each weight, and "calls" a line a call: rows, variant, threads,
// the strides of x, the number of results, bytes and file of each, x and the operands. Kernels take
// several weights and several results as arrays of pointers.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef __x86_64__
  syscall(SYS_arch_prctl, 0x1023, 18);  // permission to use the tile unit, where there is one
#endif
  std::ifstream names(folder + "/parts");
  std::vector<std::vector<void*>> weights;
  for (std::string line; std::getline(names, line);) {
    std::istringstream fields(line);
    weights.emplace_back();
    for (std::string name; fields >> name;) weights.back().push_back(contents(name));
  }

  std::ifstream calls(folder + "/calls");
  for (std::string line; std::getline(calls, line);) {
    std::istringstream fields(line);
    int64_t rows, x_e, x_row, x_col, results;
    int variant, threads;
    std::string name;
    fields >> rows >> variant >> threads >> x_e >> x_row >> x_col >> results;
    std::vector<int64_t> bytes(results);
    std::vector<std::string> out_names(results);
    std::vector<void*> outs;
    for (int64_t i = 0; i < results; ++i) {
      fields >> bytes[i] >> out_names[i];
      outs.push_back(std::malloc(bytes[i]));
    }
    fields >> name;
    void* x = contents(name);
    std::vector<void*> extra;
    while (fields >> name) extra.push_back(contents(name));
    std::vector<void*> prepared;
    for (const auto& parts : weights) {
      prepared.push_back(aligned(fxquant_prepared_bytes()));
      fxquant_prepare(parts.data(), prepared.back(), threads);
    }
    void* scratch = aligned(fxquant_scratch_bytes(rows, threads));
    const void* read = prepared.size() > 1 ? static_cast<void*>(prepared.data()) : prepared[0];
    void* written = results > 1 ? static_cast<void*>(outs.data()) : outs[0];
    fxquant_run(read, x, x_e, x_row, x_col, rows, written, extra.data(), scratch, threads, variant);
    for (int64_t i = 0; i < results; ++i)
      std::ofstream(folder + "/" + out_names[i], std::ios::binary)
          .write(static_cast<const char*>(outs[i]), bytes[i]);
    for (const auto& all : {extra, prepared, outs})
      for (void* memory : all) std::free(memory);
    for (void* memory : {x, scratch}) std::free(memory);
  }
  for (const auto& parts : weights)
    for (void* memory : parts) std::free(memory);
}
