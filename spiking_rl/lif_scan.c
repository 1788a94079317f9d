/* The scan of neurons.py in one pass forwards and one backwards, for 32-bit floats on a CPU.
 *
 * Each of B samples has N neurons, in the order in which they lie in memory, cut into pieces of P. Either the neurons of
 * a piece have parameters of their own, the same in every piece (channels-last pictures, fully connected layers; P is a
 * multiple of the channels), or one parameter holds for a whole piece (one channel of a plain picture, or one for the
 * layer). A block's membranes stay in the first cache for all timesteps: per timestep a current is read, and a spike and,
 * for the backward pass, a potential are written, nothing else.
 *
 * The backward pass sums the parameters' gradients in groups of pieces whose number does not depend on the threads:
 * any number of them gives the same result.
 */
#include <stdint.h>

#define BLOCK 512 /* neurons: with their parameters and sums they fit the first cache */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  int64_t timesteps, repeat; /* S, and how many of them each current lasts */
  int64_t batch, neurons;    /* B, N */
  int64_t piece;             /* P */
  int64_t own;               /* 1: neurons of a piece have parameters of their own; 0: one holds for the piece */
  int64_t pieces_differ;     /* 1: every piece of a sample has another parameter */
  int64_t groups, threads;
} Shape;

typedef struct {
  const float *leak, *threshold;
  const float *keep; /* (S, B), 0 where an episode starts, else 1; NULL: none starts */
} Parameters;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t pieces_of(const Shape *shape) { return (shape->neurons + shape->piece - 1) / shape->piece; }

INLINE float kept(const Shape *shape, const Parameters *p, int64_t t, int64_t sample) {
  return p->keep ? p->keep[t * shape->batch + sample] : 1.0f;
}

/* `own` is a constant where this is called, so that each of its two values gets a loop of its own. */
INLINE void forward_block(const Shape *shape, const Parameters *p, int64_t sample, int64_t first, int64_t at, int64_t size,
                          const float *current, const float *before, float *spikes, float *potentials, float *after,
                          const int own) {
  const int64_t all = shape->batch * shape->neurons;
  const float *leak = p->leak + first, *threshold = p->threshold + first;
  float membrane[BLOCK];
  for (int64_t j = 0; j < size; j++) membrane[j] = before ? before[at + j] : 0.0f;
  for (int64_t t = 0; t < shape->timesteps; t++) {
    const float *now = current + t / shape->repeat * all + at;
    const float keep = kept(shape, p, t, sample);
    float *spike = spikes + t * all + at, *potential = potentials ? potentials + t * all + at : membrane;
#pragma omp simd
    for (int64_t j = 0; j < size; j++) potential[j] = leak[own * j] * keep * membrane[j] + now[j];
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      const float u = potential[j], limit = threshold[own * j];
      spike[j] = u > limit ? 1.0f : 0.0f;
      membrane[j] = u - limit * spike[j];
    }
  }
  if (after)
    for (int64_t j = 0; j < size; j++) after[at + j] = membrane[j];
}

void lif_forward(const Shape *shape, const Parameters *p, const float *current, const float *before, float *spikes,
                 float *potentials, float *after) {
  const int64_t pieces = pieces_of(shape);
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
  for (int64_t unit = 0; unit < shape->batch * pieces; unit++) {
    const int64_t sample = unit / pieces, piece = unit % pieces;
    const int64_t start = piece * shape->piece, end = smaller(start + shape->piece, shape->neurons);
    for (int64_t n = start; n < end; n += BLOCK) {
      const int64_t at = sample * shape->neurons + n, size = smaller(BLOCK, end - n);
      if (shape->own)
        forward_block(shape, p, sample, n - start, at, size, current, before, spikes, potentials, after, 1);
      else
        forward_block(shape, p, sample, piece * shape->pieces_differ, at, size, current, before, spikes, potentials,
                      after, 0);
    }
  }
}

typedef struct {
  const float *spikes, *potentials, *after; /* gradients that arrive; each may be NULL */
} Arriving;

typedef struct {
  float *current, *before;   /* before may be NULL */
  float *leak, *threshold;   /* sums, a row per group; leak may be NULL where nothing leaks */
} Leaving;

INLINE void backward_block(const Shape *shape, const Parameters *p, float gamma, int64_t sample, int64_t first, int64_t at,
                           int64_t size, const float *potentials, const float *before, const Arriving *in,
                           const Leaving *out, int64_t row, const int own) {
  const int64_t all = shape->batch * shape->neurons;
  const float *leak = p->leak + first, *threshold = p->threshold + first;
  float *sum_threshold = out->threshold + row + first, *sum_leak = out->leak ? out->leak + row + first : 0;
  float carried[BLOCK], gathered[BLOCK]; /* dL/du'[t]; dL/dI over the timesteps that share a current */
  for (int64_t j = 0; j < size; j++) carried[j] = in->after ? in->after[at + j] : 0.0f;
  for (int64_t j = 0; j < size; j++) gathered[j] = 0.0f;
  for (int64_t t = shape->timesteps - 1; t >= 0; t--) {
    const float *u = potentials + t * all + at;
    const float *by_spike = in->spikes ? in->spikes + t * all + at : 0;
    const float *by_trace = in->potentials ? in->potentials + t * all + at : 0;
    const float keep = kept(shape, p, t, sample);
    float of_threshold = 0.0f, of_leak = 0.0f;
#pragma omp simd reduction(+ : of_threshold)
    for (int64_t j = 0; j < size; j++) {
      const float limit = threshold[own * j], relative = u[j] * (1.0f / limit), z = relative - 1.0f;
      const float slope = 1.0f - (z < 0.0f ? -z : z);
      const float through_fire = by_spike ? by_spike[j] * (slope > 0.0f ? slope : 0.0f) * (gamma / limit) : 0.0f;
      /* z = u/threshold - 1, and the reset takes threshold * s from u'. */
      const float part = -through_fire * relative - (u[j] > limit ? carried[j] : 0.0f);
      if (own)
        sum_threshold[j] += part;
      else
        of_threshold += part;
      carried[j] += through_fire + (by_trace ? by_trace[j] : 0.0f);
      gathered[j] += carried[j];
    }
    if (!own) *sum_threshold += of_threshold;
    const float *earlier = t ? u - all : 0;
    if (sum_leak && (earlier || before)) {
#pragma omp simd reduction(+ : of_leak)
      for (int64_t j = 0; j < size; j++) {
        const float limit = threshold[own * j];
        const float reset = earlier ? earlier[j] - (earlier[j] > limit ? limit : 0.0f) : before[at + j];
        const float part = carried[j] * keep * reset;
        if (own)
          sum_leak[j] += part;
        else
          of_leak += part;
      }
      if (!own) *sum_leak += of_leak;
    }
#pragma omp simd
    for (int64_t j = 0; j < size; j++) carried[j] *= leak[own * j] * keep;
    if (t % shape->repeat == 0) {
      float *now = out->current + t / shape->repeat * all + at;
      for (int64_t j = 0; j < size; j++) now[j] = gathered[j];
      for (int64_t j = 0; j < size; j++) gathered[j] = 0.0f;
    }
  }
  if (out->before)
    for (int64_t j = 0; j < size; j++) out->before[at + j] = carried[j];
}

void lif_backward(const Shape *shape, const Parameters *p, float gamma, const float *potentials, const float *before,
                  const Arriving *in, const Leaving *out) {
  const int64_t pieces = pieces_of(shape), units = shape->batch * pieces;
  const int64_t width = shape->own ? shape->piece : shape->pieces_differ ? pieces : 1;
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
  for (int64_t group = 0; group < shape->groups; group++)
    for (int64_t unit = units * group / shape->groups; unit < units * (group + 1) / shape->groups; unit++) {
      const int64_t sample = unit / pieces, piece = unit % pieces;
      const int64_t start = piece * shape->piece, end = smaller(start + shape->piece, shape->neurons);
      for (int64_t n = start; n < end; n += BLOCK) {
        const int64_t at = sample * shape->neurons + n, size = smaller(BLOCK, end - n);
        if (shape->own)
          backward_block(shape, p, gamma, sample, n - start, at, size, potentials, before, in, out, group * width, 1);
        else
          backward_block(shape, p, gamma, sample, piece * shape->pieces_differ, at, size, potentials, before, in, out,
                         group * width, 0);
      }
    }
}
