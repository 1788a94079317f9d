/* The scan of neurons.py in one pass forwards and one backwards, on a CPU, of currents and spikes in 32-bit floats or in
 * bfloat16; whatever is added up over time or neurons is in 32-bit floats with both.
 *
 * Each of B samples has N neurons, in the order in which they lie in memory, cut into pieces of P. Either the neurons of
 * a piece have parameters of their own, the same in every piece (channels-last pictures, fully connected layers; P is a
 * multiple of the C channels), or one parameter holds for a whole piece (one channel of a plain picture, or one for the
 * layer). A block's membranes stay in the first cache for all timesteps: per timestep a current is read and a spike
 * written, nothing else. Memory is what a scan costs, so potentials are not kept for the backward pass: it computes
 * them again, in the cache, from the currents.
 *
 * The backward pass sums the parameters' gradients in groups of pieces whose number does not depend on the threads:
 * any number of them gives the same result.
 */
#include "stored.h"
#include <stdlib.h>

#define BLOCK 512 /* neurons, at most */
#define MOST 5    /* timesteps that are few */
#define TINY 1e-30f /* what leaks over many timesteps ends in denormal numbers, on which the next convolution takes ages */

typedef struct {
  int64_t timesteps, repeat; /* S, and how many of them each current lasts */
  int64_t batch, neurons;    /* B, N */
  int64_t piece;             /* P */
  int64_t channels;          /* C: parameters of the layer; 1 if they are shared */
  int64_t own;               /* 1: neurons of a piece have parameters of their own; 0: one holds for the piece */
  int64_t leaks, thresholds; /* how many are given: 1, or C */
  int64_t once;              /* 1: a neuron fires at most once; from rest and without episode starts only */
  int64_t groups, threads;
} Shape;

/* What a pass works with: parameters spread over a piece, and the sizes of its loops. */
typedef struct {
  Shape shape;
  const float *keep; /* (S, B), 0 where an episode starts, else 1; NULL: none starts */
  float *leak, *threshold, *inverse, *height; /* 1 / threshold; of the surrogate gradient: gamma / threshold */
  int64_t pieces, width, block, all;
} Pass;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int begin(Pass *pass, const Shape *shape, const float *leak, const float *threshold, const float *keep, float gamma) {
  const int64_t width = shape->own ? shape->piece : shape->channels;
  pass->shape = *shape;
  pass->keep = keep;
  pass->pieces = (shape->neurons + shape->piece - 1) / shape->piece;
  pass->width = width;
  pass->block = smaller(BLOCK, (1 << 15) / shape->timesteps / 16 * 16); /* all timesteps of a block in the second cache */
  if (pass->block < 64) pass->block = 64;
  pass->all = shape->batch * shape->neurons;
  pass->leak = malloc(4 * width * sizeof(float));
  if (!pass->leak) return 0;
  pass->threshold = pass->leak + width;
  pass->inverse = pass->threshold + width;
  pass->height = pass->inverse + width;
  for (int64_t i = 0; i < width; i += shape->channels)
    for (int64_t c = 0; c < shape->channels; c++) {
      pass->leak[i + c] = leak[shape->leaks > 1 ? c : 0];
      pass->threshold[i + c] = threshold[shape->thresholds > 1 ? c : 0];
      pass->inverse[i + c] = 1.0f / pass->threshold[i + c];
      pass->height[i + c] = gamma * pass->inverse[i + c];
    }
  return 1;
}

/* A block of neurons of one sample: their place in a timestep, and that of their first parameter. */
typedef struct {
  int64_t sample, at, size, first;
} Block;

/* Calls DO(block) for every block of one piece of one sample. */
#define EACH_BLOCK(pass, unit, b, DO)                                                                    \
  do {                                                                                                   \
    const Shape *s = &(pass)->shape;                                                                     \
    const int64_t sample = (unit) / (pass)->pieces, piece = (unit) % (pass)->pieces;                     \
    const int64_t start = piece * s->piece, end = smaller(start + s->piece, s->neurons);                 \
    for (int64_t n = start; n < end; n += (pass)->block) {                                               \
      const int64_t first = s->own ? n - start : s->channels > 1 ? piece : 0;                            \
      const Block b = {sample, sample * s->neurons + n, smaller((pass)->block, end - n), first};         \
      DO;                                                                                                \
    }                                                                                                    \
  } while (0)

INLINE float keep_at(const Pass *pass, int64_t t, int64_t sample) {
  return pass->keep ? pass->keep[t * pass->shape.batch + sample] : 1.0f;
}

/* Asks for the same stretch of the block that comes next: at every block all streams begin anew, which the processor's
 * own prefetching takes a while to see. */
INLINE void ahead(const void *stretch, int64_t bytes, const int write) {
  for (int64_t at = 0; at < bytes; at += 64) {
    if (write)
      __builtin_prefetch((const char *)stretch + bytes + at, 1);
    else
      __builtin_prefetch((const char *)stretch + bytes + at, 0);
  }
}

/* Calls FUNCTION with the arguments given and its two constants. */
#define WITH_CONSTANTS(shape, FUNCTION, ...)       \
  do {                                             \
    if ((shape)->own && (shape)->once)             \
      FUNCTION(__VA_ARGS__, 1, 1);                 \
    else if ((shape)->own)                         \
      FUNCTION(__VA_ARGS__, 1, 0);                 \
    else if ((shape)->once)                        \
      FUNCTION(__VA_ARGS__, 0, 1);                 \
    else                                           \
      FUNCTION(__VA_ARGS__, 0, 0);                 \
  } while (0)

/* One fresh timestep: the potential is the current. */
INLINE int alone(const Pass *pass, const float *before) { return pass->shape.timesteps == 1 && !before; }

/* A few fresh timesteps, of a current each or of one that lasts. */
INLINE int few(const Pass *pass, const float *before) {
  const Shape *s = &pass->shape;
  return s->timesteps > 1 && s->timesteps <= MOST && (s->repeat == 1 || s->repeat == s->timesteps) && !before && !pass->keep;
}

INLINE void rest(const Block *b, const float *before, float *membrane) {
  for (int64_t j = 0; j < b->size; j++) membrane[j] = before ? before[b->at + j] : 0.0f;
}

/* Adds a block's gradients of a parameter to a row: each to its own, or all to the one they share. */
INLINE void add_sums(float *row, const float *values, int64_t size, const int own) {
  float total = 0.0f;
  if (own) {
#pragma omp simd
    for (int64_t j = 0; j < size; j++) row[j] += values[j];
    return;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < size; j++) total += values[j];
  *row += total;
}

/* Whether a neuron fires at timestep t, of those that fire once (`once`, a constant) as the forward pass found. */
INLINE int fires(float u, float limit, float when, int64_t t, const int once) {
  return once ? when == (float)t : u > limit;
}

/* ds/du times the gradient that arrives at a spike; `relative` is u/threshold. */
INLINE float through_fire(float by_spike, float relative, float height) {
  const float z = relative - 1.0f, slope = 1.0f - (z < 0.0f ? -z : z);
  return by_spike * (slope > 0.0f ? slope : 0.0f) * height;
}

/* Gradients of a block at one timestep; `carried` is dL/du' at it, and dL/du' at the one before afterwards. */
typedef struct {
  float carried[BLOCK], shared[BLOCK], leak[BLOCK], threshold[BLOCK];
  float when[BLOCK]; /* of neurons that fire at most once, the timestep at which they do; S for never */
} Gradients;

/* Adds up the groups' rows, and channels that share a parameter. */
static void gather(const Pass *pass, const float *sums, float *total, int64_t parameters) {
  for (int64_t i = 0; i < parameters; i++) total[i] = 0.0f;
  for (int64_t group = 0; group < pass->shape.groups; group++)
    for (int64_t i = 0; i < pass->width; i += parameters)
#pragma omp simd
      for (int64_t c = 0; c < parameters; c++) total[c] += sums[2 * pass->width * group + i + c];
}

/* The loops, for one way to store currents, spikes and their gradients: a library each. */
#include "lif_loops.h"
