// Which variants the processor can run. Compiled without special instructions, so that it runs everywhere.
#include <cstring>

extern "C" __attribute__((visibility("default"))) int can_run(const char* variant) {
  if (!strcmp(variant, "portable")) return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!strcmp(variant, "avx2")) return avx2;
  if (!strcmp(variant, "avx512")) return avx512;
  if (!strcmp(variant, "avx512bf16"))  // every processor with bf16 dot products also has those of int8 (VNNI)
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return 0;
}
