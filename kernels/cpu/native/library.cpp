// What all variants share, compiled without special instructions, so that it runs everywhere.
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HAS(name) \
  if (!strcmp(instructions, name)) return __builtin_cpu_supports(name) != 0

// Whether the processor has an instruction set
EXPORT int has(const char* instructions) {
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
#elif defined(__aarch64__)
  if (!strcmp(instructions, "neon")) return 1;  // part of the architecture
#endif
  return 0;
}

// A step of a recorded program: an entry point and the address of its structure
struct Step {
  void (*entry)(const void*);
  const void* call;
};

EXPORT void run(const Step* steps, long count) {
  for (long i = 0; i < count; i++) steps[i].entry(steps[i].call);
}
