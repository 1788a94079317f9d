/* Numbers as they are stored, 32-bit floats or bfloat16: a library is built for each. READ makes a float of what is
 * STORED, WRITE makes it of a float. */
#pragma once
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* bfloat16 is the upper half of a 32-bit float. */
INLINE float widen(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

/* Rounds to nearest, ties to even, as torch does; what is no number stays none. */
INLINE uint16_t narrow(float wide) {
  uint32_t bits;
  memcpy(&bits, &wide, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)(wide == wide ? rounded : 0x7fc0);
}

#ifdef HALVES
typedef uint16_t STORED;
#define READ(x) widen(x)
#define WRITE(x) narrow(x)
#else
typedef float STORED;
#define READ(x) (x)
#define WRITE(x) (x)
#endif
