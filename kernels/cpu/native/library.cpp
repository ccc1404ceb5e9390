// Which instruction sets the processor has. Compiled without special instructions, so that it runs everywhere.
#include <cstring>

#define HAS(name) \
  if (!strcmp(instructions, name)) return __builtin_cpu_supports(name) != 0

extern "C" __attribute__((visibility("default"))) int has(const char* instructions) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  HAS("avx2");
  HAS("fma");
  HAS("avx512f");
  HAS("avx512bw");
  HAS("avx512dq");
  HAS("avx512vl");
  HAS("avx512bf16");
  HAS("avx512vnni");
#endif
  return 0;
}
