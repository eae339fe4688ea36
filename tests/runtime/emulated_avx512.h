// AVX-512 for the kernel on processors without it: included before kernel.cpp, it puts functions of SIMDe, and
// some of its own after Intel's description of the operations, in place of the instructions.

#pragma once
#include <immintrin.h>

#include <cstring>

#define SIMDE_NO_NATIVE
#include <simde/x86/avx512.h>

#define AVX512 __attribute__((target("popcnt")))

extern "C" {
int64_t emulated_expansions = 0;  // so that a test knows that its path was taken; one thread
}

inline simde__m512i emulated_maskz_loadu_epi8(uint64_t mask, const void* from) {
    uint8_t to[64] = {};
    for (int i = 0; i < 64; ++i)
        if (mask >> i & 1) to[i] = static_cast<const uint8_t*>(from)[i];  // what is masked out is not touched
    return simde_mm512_loadu_si512(to);
}

inline simde__m512i emulated_maskz_expand_epi16(uint32_t mask, simde__m512i values) {
    ++emulated_expansions;
    uint16_t from[32], to[32] = {};
    std::memcpy(from, &values, sizeof from);
    for (int i = 0, next = 0; i < 32; ++i)
        if (mask >> i & 1) to[i] = from[next++];
    return simde_mm512_loadu_si512(to);
}

inline void emulated_mask_storeu_epi16(void* to, uint32_t mask, simde__m512i values) {
    uint16_t from[32];
    std::memcpy(from, &values, sizeof from);
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = from[i];
}

__attribute__((target("f16c"))) inline float widened_half(uint16_t half) { return _cvtsh_ss(half); }

inline simde__m512 emulated_cvtph_ps(simde__m256i halves) {
    uint16_t from[16];
    float to[16];
    std::memcpy(from, &halves, sizeof from);
    for (int i = 0; i < 16; ++i) to[i] = widened_half(from[i]);
    return simde_mm512_loadu_ps(to);
}

inline simde__m512i emulated_broadcast_i32x4(__m128i quarter) {
    simde__m128i same;
    std::memcpy(&same, &quarter, sizeof same);
    return simde_mm512_broadcast_i32x4(same);
}

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512bh simde__m512bh
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm512_maskz_expand_epi16 emulated_maskz_expand_epi16
#define _mm512_mask_storeu_epi16 emulated_mask_storeu_epi16
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_shuffle_epi8 simde_mm512_shuffle_epi8
#define _mm512_maskz_mov_epi8 simde_mm512_maskz_mov_epi8
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_or_si512 simde_mm512_or_si512
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#define _mm512_slli_epi16 simde_mm512_slli_epi16
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_castsi512_si256 simde_mm512_castsi512_si256
#define _mm512_extracti64x4_epi64 simde_mm512_extracti64x4_epi64
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_dpbf16_ps simde_mm512_dpbf16_ps
