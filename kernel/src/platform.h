/* What depends on compiler and processor. */
#ifndef VJ_PLATFORM_H
#define VJ_PLATFORM_H

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VJ_X86 1
#include <immintrin.h>
/* Functions with this mark run only if vj_supported() is true. */
#define VJ_AVX2 __attribute__((target("avx2,bmi,bmi2")))
#else
#define VJ_X86 0
#endif

#define VJ_UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define VJ_INLINE static inline __attribute__((always_inline))

#if defined(__SANITIZE_ADDRESS__)
#define VJ_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VJ_ASAN 1
#endif
#endif
#ifndef VJ_ASAN
#define VJ_ASAN 0
#endif

#endif
