/* Active inputs of a map, listed channel by channel, and how each of them meets the weights and the outputs.
 *
 * Pictures lie in memory with their channels last. All inputs of one channel follow each other, so that its weights
 * stay in the first cache; the weights of one of its rows lie in the order of the outputs, so that what an input and a
 * row of outputs have to do with each other is one stretch.
 */
#pragma once
#include "stored.h"
#include <stdlib.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define CACHED (1 << 16) /* bytes of outputs that are worked on at a time */

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Counts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
  int64_t batch;
  int64_t height, width, channels;   /* of the inputs */
  int64_t rows, columns, outputs;    /* of the outputs; `outputs` are their channels */
  int64_t tall, wide;                /* the kernel */
  int64_t down, across, above, left; /* strides and padding */
  int64_t most;                      /* per mille of the inputs that may be active */
  int64_t threads;                   /* 1: several pay */
} Map;

/* What one thread works on at a time: samples, a part of their outputs, and some channels of their inputs. */
typedef struct {
  int64_t sample, samples;
  int64_t from, channels; /* of the inputs: the first, and how many */
  int64_t row, rows;      /* of the outputs: the first, and the one behind the last */
  int64_t first, outputs; /* channels of the outputs: the first, and how many; all but for a linear map */
  int64_t top, bottom;    /* rows of the inputs that reach them */
  int64_t origin;         /* place of the first output that is held */
} Unit;

/* An active input; no side of a picture is longer than its numbers reach. */
typedef struct {
  uint16_t sample, y, x;
  float amount;
} Event;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Whether an input is active, by its bits: what is near zero must not be one thing to one thread and another to the
 * next, of which one takes denormal numbers for zero. */
#ifdef HALVES
INLINE int fires(STORED x) { return (x & 0x7fff) != 0; }
#else
INLINE int fires(STORED x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits << 1 != 0;
}
#endif

/* Counts the active inputs of a unit by channel. */
static void count(const Map *map, const Unit *unit, const STORED *inputs, int32_t *counts) {
  const int64_t channels = unit->channels;
  memset(counts, 0, channels * sizeof *counts);
  for (int64_t sample = unit->sample; sample < unit->sample + unit->samples; sample++)
    for (int64_t pixel = unit->top * map->width; pixel < unit->bottom * map->width; pixel++) {
      const STORED *x = inputs + (sample * map->height * map->width + pixel) * map->channels + unit->from;
      int64_t c = 0;
#ifdef HALVES
#pragma omp simd
      for (int64_t j = 0; j < channels / LANES * LANES; j++) counts[j] += fires(x[j]);
      c = channels / LANES * LANES;
#else
      for (; c + LANES <= channels; c += LANES) *(Counts *)(counts + c) -= (*(const Counts *)(x + c) & 0x7fffffff) != 0;
#endif
      for (; c < channels; c++) counts[c] += fires(x[c]);
    }
}

/* Turns the counts of channels into the places of their first events; returns how many events there are. */
static int32_t places(const Unit *unit, int32_t *counts) {
  int32_t sum = 0;
  for (int64_t c = 0; c < unit->channels; c++) {
    const int32_t here = counts[c];
    counts[c] = sum;
    sum += here;
  }
  return sum;
}

/* A bit for each of up to eight inputs: 1 if it is active. */
INLINE unsigned firing(const STORED *x, int64_t size) {
#ifdef __AVX2__
  if (size == 8) {
#ifdef HALVES
    const __m128i halves = _mm_slli_epi16(_mm_loadu_si128((const __m128i *)x), 1);
    const __m128i none = _mm_cmpeq_epi16(halves, _mm_setzero_si128());
    return 0xff & ~(unsigned)_mm_movemask_epi8(_mm_packs_epi16(none, none));
#else
    const __m256i bits = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)x), 1);
    const __m256i silent = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
    return 0xff & ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(silent));
#endif
  }
#endif
  unsigned bits = 0;
  for (int64_t j = 0; j < size; j++) bits |= (unsigned)fires(x[j]) << j;
  return bits;
}

/* Lists the active inputs of a unit, channel after channel; `next` are the places of the channels' first ones, and of
 * those behind their last ones afterwards. No more than were counted, whoever may be writing to the inputs. */
static void list(const Map *map, const Unit *unit, const STORED *inputs, int32_t *next, int32_t counted, Event *events) {
  const int64_t channels = unit->channels;
  for (int64_t sample = 0; sample < unit->samples; sample++)
    for (int64_t y = unit->top; y < unit->bottom; y++)
      for (int64_t x = 0; x < map->width; x++) {
        const int64_t pixel = ((unit->sample + sample) * map->height + y) * map->width + x;
        const STORED *at = inputs + pixel * map->channels + unit->from;
        for (int64_t c = 0; c < channels; c += 8) {
          unsigned active = firing(at + c, smaller(8, channels - c));
          for (; active; active &= active - 1) {
            const int64_t which = c + __builtin_ctz(active);
            const Event event = {(uint16_t)sample, (uint16_t)y, (uint16_t)x, READ(at[which])};
            if (next[which] < counted) events[next[which]++] = event;
          }
        }
      }
}

INLINE void add(float *outputs, const float *weights, float amount, int64_t size) {
  int64_t j = 0;
  Lanes *out = (Lanes *)outputs;
  const Lanes *in = (const Lanes *)weights;
  for (; j + 4 * LANES <= size; j += 4 * LANES, out += 4, in += 4) { /* four at once: twice as fast as one by one */
    const Lanes a = out[0] + amount * in[0], b = out[1] + amount * in[1];
    const Lanes c = out[2] + amount * in[2], d = out[3] + amount * in[3];
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
  }
  for (; j + LANES <= size; j += LANES, out++, in++) *out += amount * *in;
  for (; j < size; j++) outputs[j] += amount * weights[j];
}

/* Adds what gradients of outputs, as they are stored, give to those of weights. */
INLINE void add_stored(float *weights, const STORED *gradients, float amount, int64_t size) {
#ifdef HALVES
#pragma omp simd
  for (int64_t j = 0; j < size; j++) weights[j] += amount * READ(gradients[j]);
#else
  add(weights, gradients, amount, size);
#endif
}

/* Lets the inputs of one channel meet its weights, which are (rows of the kernel, phase, steps, outputs): adds what they
 * give to the outputs or, the other way round (`back`), what the outputs' gradients give to the weights'. A column
 * of the inputs reaches every `across`-th column of the kernel only, by its phase; `steps` is how many these are. */
INLINE void meet(const Map *map, const Unit *unit, const Event *event, const Event *end, float *weights, float *outputs,
                 const STORED *gradients, const int64_t down, const int64_t across, const int back) {
  const int64_t steps = (map->wide + across - 1) / across, all = map->outputs;
  for (; event < end; event++) {
    const int64_t x = event->x + map->left, y = event->y + map->above, nearest = (uint64_t)x / across;
    const int64_t phase = x - nearest * across;
    const int64_t column = nearest - (steps - 1); /* reached by the first of the steps, may lie outside */
    const int64_t missing = phase + across * (steps - 1) >= map->wide; /* the kernel ends before this step */
    const int64_t skip = larger(missing, -column), size = smaller(steps, map->columns - column) - skip;
    if (size <= 0) continue;
    const int64_t highest = larger(0, y - map->tall + down), stretch = size == 1 ? unit->outputs : size * all;
    for (int64_t row = larger(unit->row, (uint64_t)highest / down); row < unit->rows; row++) {
      const int64_t tap = y - row * down;
      if (tap < 0) break;
      const int64_t place = ((unit->sample + event->sample) * map->rows + row) * map->columns + column + skip;
      const int64_t at = (place - unit->origin) * all + unit->first;
      float *own = weights + ((tap * across + phase) * steps + skip) * all + unit->first;
      if (back)
        add_stored(own, gradients + at, event->amount, stretch);
      else
        add(outputs + at, own, event->amount, stretch);
    }
  }
}

/* Lets all listed inputs of a unit meet their weights; `ends` are the places behind the channels' last events. */
INLINE void meet_all(const Map *map, const Unit *unit, const Event *events, const int32_t *ends, float *weights,
                     float *outputs, const STORED *gradients, const int back) {
  const int64_t stretch = map->tall * map->across * ((map->wide + map->across - 1) / map->across) * map->outputs;
  for (int64_t c = 0, begin = 0; c < unit->channels; begin = ends[c++]) {
    const Event *first = events + begin, *end = events + ends[c];
    float *own = weights + (unit->from + c) * stretch;
    if (map->down == 1 && map->across == 1) /* to divide by constants takes no time */
      meet(map, unit, first, end, own, outputs, gradients, 1, 1, back);
    else if (map->down == 2 && map->across == 2)
      meet(map, unit, first, end, own, outputs, gradients, 2, 2, back);
    else
      meet(map, unit, first, end, own, outputs, gradients, map->down, map->across, back);
  }
}
