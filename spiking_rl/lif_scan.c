/* The scan of neurons.py in one pass forwards and one backwards, for 32-bit floats on a CPU.
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
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 512 /* neurons, at most */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  int64_t timesteps, repeat; /* S, and how many of them each current lasts */
  int64_t batch, neurons;    /* B, N */
  int64_t piece;             /* P */
  int64_t channels;          /* C: parameters of the layer; 1 if they are shared */
  int64_t own;               /* 1: neurons of a piece have parameters of their own; 0: one holds for the piece */
  int64_t groups, threads;
} Shape;

typedef struct {
  const float *leak, *threshold; /* one, or one per channel ... */
  int64_t leaks, thresholds;     /* ... as these say */
  const float *keep;             /* (S, B), 0 where an episode starts, else 1; NULL: none starts */
} Parameters;

/* What a pass works with: parameters spread over a piece, and the sizes of its loops. */
typedef struct {
  Shape shape;
  const float *keep;
  float *leak, *threshold;
  int64_t pieces, width, block, all;
} Pass;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int begin(Pass *pass, const Shape *shape, const Parameters *p) {
  const int64_t width = shape->own ? shape->piece : shape->channels;
  pass->shape = *shape;
  pass->keep = p->keep;
  pass->pieces = (shape->neurons + shape->piece - 1) / shape->piece;
  pass->width = width;
  pass->block = smaller(BLOCK, (1 << 15) / shape->timesteps / 16 * 16); /* all timesteps of a block in the second cache */
  if (pass->block < 64) pass->block = 64;
  pass->all = shape->batch * shape->neurons;
  pass->leak = malloc(2 * width * sizeof(float));
  if (!pass->leak) return 0;
  pass->threshold = pass->leak + width;
  for (int64_t i = 0; i < width; i++) {
    pass->leak[i] = p->leak[p->leaks > 1 ? i % shape->channels : 0];
    pass->threshold[i] = p->threshold[p->thresholds > 1 ? i % shape->channels : 0];
  }
  return 1;
}

/* A block of neurons of one sample: their place in a timestep, and that of their first parameter. */
typedef struct {
  int64_t sample, at, size, first;
} Block;

/* `own` is a constant wherever these are called, so that each of its two values gets loops of its own. */
INLINE float keep_at(const Pass *pass, int64_t t, int64_t sample) {
  return pass->keep ? pass->keep[t * pass->shape.batch + sample] : 1.0f;
}

INLINE void integrate(const Pass *pass, const Block *b, int64_t t, const float *current, const float *membrane,
                      float *potential, const int own) {
  const float *leak = pass->leak + b->first, *now = current + t / pass->shape.repeat * pass->all + b->at;
  const float keep = keep_at(pass, t, b->sample);
#pragma omp simd
  for (int64_t j = 0; j < b->size; j++) potential[j] = leak[own * j] * keep * membrane[j] + now[j];
}

INLINE void rest(const Block *b, const float *before, float *membrane) {
  for (int64_t j = 0; j < b->size; j++) membrane[j] = before ? before[b->at + j] : 0.0f;
}

INLINE void forward_block(const Pass *pass, const Block *b, const float *current, const float *before, float *spikes,
                          float *potentials, float *after, const int own) {
  const float *threshold = pass->threshold + b->first;
  float membrane[BLOCK];
  rest(b, before, membrane);
  for (int64_t t = 0; t < pass->shape.timesteps; t++) {
    float *spike = spikes + t * pass->all + b->at;
    float *potential = potentials ? potentials + t * pass->all + b->at : membrane;
    integrate(pass, b, t, current, membrane, potential, own);
#pragma omp simd
    for (int64_t j = 0; j < b->size; j++) {
      const float u = potential[j], limit = threshold[own * j];
      spike[j] = u > limit ? 1.0f : 0.0f;
      membrane[j] = u - (u > limit ? limit : 0.0f);
    }
  }
  if (after)
    for (int64_t j = 0; j < b->size; j++) after[b->at + j] = membrane[j];
}

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

/* Returns 0 where memory ran out. */
int lif_forward(const Shape *shape, const Parameters *p, const float *current, const float *before, float *spikes,
                float *potentials, float *after) {
  Pass pass;
  if (!begin(&pass, shape, p)) return 0;
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
  for (int64_t unit = 0; unit < shape->batch * pass.pieces; unit++) {
    if (shape->own)
      EACH_BLOCK(&pass, unit, b, forward_block(&pass, &b, current, before, spikes, potentials, after, 1));
    else
      EACH_BLOCK(&pass, unit, b, forward_block(&pass, &b, current, before, spikes, potentials, after, 0));
  }
  free(pass.leak);
  return 1;
}

typedef struct {
  const float *spikes, *potentials, *after; /* gradients that arrive; each may be NULL */
} Arriving;

typedef struct {
  float *current, *before; /* gradients that leave; before may be NULL */
  float *leak, *threshold; /* one, or one per channel, as Parameters says; leak may be NULL */
} Leaving;

/* `sums` is a row of leak's, then of threshold's, gradients; `scratch` holds S potentials of a block. */
INLINE void backward_block(const Pass *pass, const Block *b, float gamma, const float *current, const float *before,
                           const Arriving *in, const Leaving *out, float *sums, float *scratch, const int own) {
  const int64_t size = b->size, all = pass->all, at = b->at;
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  float *sum_leak = sums + b->first, *sum_threshold = sums + pass->width + b->first;
  float membrane[BLOCK], carried[BLOCK], gathered[BLOCK]; /* u', dL/du', dL/dI over timesteps with one current */
  rest(b, before, membrane);
  for (int64_t t = 0; t < pass->shape.timesteps; t++) {
    float *u = scratch + t * size;
    integrate(pass, b, t, current, membrane, u, own);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) membrane[j] = u[j] - (u[j] > threshold[own * j] ? threshold[own * j] : 0.0f);
  }
  for (int64_t j = 0; j < size; j++) carried[j] = in->after ? in->after[at + j] : 0.0f;
  for (int64_t j = 0; j < size; j++) gathered[j] = 0.0f;
  for (int64_t t = pass->shape.timesteps - 1; t >= 0; t--) {
    const float *u = scratch + t * size;
    const float *by_spike = in->spikes ? in->spikes + t * all + at : 0;
    const float *by_trace = in->potentials ? in->potentials + t * all + at : 0;
    const float keep = keep_at(pass, t, b->sample);
    float of_threshold = 0.0f, of_leak = 0.0f;
#pragma omp simd reduction(+ : of_threshold)
    for (int64_t j = 0; j < size; j++) {
      const float limit = threshold[own * j], relative = u[j] / limit, z = relative - 1.0f;
      const float slope = 1.0f - (z < 0.0f ? -z : z);
      const float through_fire = by_spike ? by_spike[j] * (slope > 0.0f ? slope : 0.0f) * (gamma / limit) : 0.0f;
      /* z = u/threshold - 1, and the reset takes threshold * s from u'. */
      const float part = -through_fire * relative - (z > 0.0f ? carried[j] : 0.0f);
      if (own)
        sum_threshold[j] += part;
      else
        of_threshold += part;
      carried[j] += through_fire + (by_trace ? by_trace[j] : 0.0f);
      gathered[j] += carried[j];
    }
    if (!own) *sum_threshold += of_threshold;
    const float *earlier = t ? u - size : 0;
    if (out->leak && (earlier || before)) {
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
    if (t % pass->shape.repeat == 0) {
      float *now = out->current + t / pass->shape.repeat * all + at;
      for (int64_t j = 0; j < size; j++) now[j] = gathered[j];
      for (int64_t j = 0; j < size; j++) gathered[j] = 0.0f;
    }
#pragma omp simd
    for (int64_t j = 0; j < size; j++) carried[j] *= leak[own * j] * keep;
  }
  if (out->before)
    for (int64_t j = 0; j < size; j++) out->before[at + j] = carried[j];
}

/* Adds up the groups' rows, and channels that share a parameter. */
static void gather(const Pass *pass, const float *sums, float *total, int64_t parameters) {
  for (int64_t i = 0; i < parameters; i++) total[i] = 0.0f;
  for (int64_t group = 0; group < pass->shape.groups; group++)
    for (int64_t i = 0; i < pass->width; i++)
      total[parameters > 1 ? i % parameters : 0] += sums[2 * pass->width * group + i];
}

/* Returns 0 where memory ran out. */
int lif_backward(const Shape *shape, const Parameters *p, float gamma, const float *current, const float *before,
                 const Arriving *in, const Leaving *out) {
  Pass pass;
  if (!begin(&pass, shape, p)) return 0;
  const int64_t units = shape->batch * pass.pieces, room = shape->timesteps * pass.block;
  float *sums = calloc(2 * shape->groups * pass.width, sizeof(float));
  float *scratch = malloc(shape->groups * room * sizeof(float));
  const int enough = sums && scratch;
  if (enough) {
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
    for (int64_t group = 0; group < shape->groups; group++) {
      float *row = sums + 2 * pass.width * group, *own = scratch + room * group;
      for (int64_t unit = units * group / shape->groups; unit < units * (group + 1) / shape->groups; unit++) {
        if (shape->own)
          EACH_BLOCK(&pass, unit, b, backward_block(&pass, &b, gamma, current, before, in, out, row, own, 1));
        else
          EACH_BLOCK(&pass, unit, b, backward_block(&pass, &b, gamma, current, before, in, out, row, own, 0));
      }
    }
    if (out->leak) gather(&pass, sums, out->leak, p->leaks);
    gather(&pass, sums + pass.width, out->threshold, p->thresholds);
  }
  free(scratch);
  free(sums);
  free(pass.leak);
  return enough;
}
