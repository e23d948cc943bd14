// Target regions: an ISA file includes its headers first, then opens a region, so that only the
// kernels in the region are compiled with wide instructions. Per-file -m flags would also widen the
// weak std symbols that the file emits, and the linker may keep those copies for the whole library.
#pragma once

#define QK_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define QK_TARGET_BEGIN(isa) \
  QK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define QK_TARGET_END QK_PRAGMA(clang attribute pop)
#else
#define QK_TARGET_BEGIN(isa) QK_PRAGMA(GCC push_options) QK_PRAGMA(GCC target(isa))
#define QK_TARGET_END QK_PRAGMA(GCC pop_options)
#endif

// The x86 paths. Each kernel file opens exactly one of them.
#define QK_ISA_AVX2 "avx2,fma,f16c"
#if defined(QK_EMULATE_AVXVNNI)  // csrc/base/x86_avxvnni.h
#define QK_ISA_AVXVNNI QK_ISA_AVX2
#else
#define QK_ISA_AVXVNNI "avx2,fma,f16c,avxvnni"
#endif
#define QK_ISA_AVX512VNNI \
  "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512"
#define QK_ISA_AVX512VBMI \
  "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,prefer-vector-width=512"

#define QK_ISA_AMX                                                                               \
  "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,prefer-vector-" \
  "width=512"

#define QK_INLINE static inline __attribute__((always_inline))
