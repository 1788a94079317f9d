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
#define TINY 1e-30f /* what leaks over many timesteps ends in denormal numbers, on which the next convolution takes ages */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  int64_t timesteps, repeat; /* S, and how many of them each current lasts */
  int64_t batch, neurons;    /* B, N */
  int64_t piece;             /* P */
  int64_t channels;          /* C: parameters of the layer; 1 if they are shared */
  int64_t own;               /* 1: neurons of a piece have parameters of their own; 0: one holds for the piece */
  int64_t leaks, thresholds; /* how many are given: 1, or C */
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

/* `own` is a constant wherever these are called, so that each of its two values gets loops of its own. */
INLINE float keep_at(const Pass *pass, int64_t t, int64_t sample) {
  return pass->keep ? pass->keep[t * pass->shape.batch + sample] : 1.0f;
}

INLINE const float *current_at(const Pass *pass, const Block *b, int64_t t, const float *current) {
  return current + t / pass->shape.repeat * pass->all + b->at;
}

/* Asks for the same stretch of the block that comes next: at every block all streams begin anew, which the processor's
 * own prefetching takes a while to see. */
INLINE void ahead(const float *stretch, int64_t size) {
  for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(stretch + size + j);
}

INLINE void ahead_to_write(const float *stretch, int64_t size) {
  for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(stretch + size + j, 1);
}

/* One fresh timestep: the potential is the current. */
INLINE int alone(const Pass *pass, const float *before) { return pass->shape.timesteps == 1 && !before; }

INLINE void rest(const Block *b, const float *before, float *membrane) {
  for (int64_t j = 0; j < b->size; j++) membrane[j] = before ? before[b->at + j] : 0.0f;
}

INLINE void forward_block(const Pass *pass, const Block *b, const float *current, const float *before, float *spikes,
                          float *potentials, float *after, const int own) {
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  if (alone(pass, before) && !potentials && !after) {
    const float *now = current + b->at;
    float *spike = spikes + b->at;
    ahead(now, b->size);
    ahead_to_write(spike, b->size);
#pragma omp simd
    for (int64_t j = 0; j < b->size; j++) spike[j] = now[j] > threshold[own * j] ? 1.0f : 0.0f;
    return;
  }
  float membrane[BLOCK];
  rest(b, before, membrane);
  for (int64_t t = 0; t < pass->shape.timesteps; t++) {
    const float *now = current_at(pass, b, t, current);
    const float keep = keep_at(pass, t, b->sample);
    float *spike = spikes + t * pass->all + b->at;
    ahead(now, b->size);
    ahead_to_write(spike, b->size);
    if (potentials) {
      float *potential = potentials + t * pass->all + b->at;
      for (int64_t j = 0; j < b->size; j++) potential[j] = leak[own * j] * keep * membrane[j] + now[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < b->size; j++) {
      const float u = leak[own * j] * keep * membrane[j] + now[j], limit = threshold[own * j];
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
int lif_forward(const Shape *shape, const float *leak, const float *threshold, const float *keep, const float *current,
                const float *before, float *spikes, float *potentials, float *after) {
  Pass pass;
  if (!begin(&pass, shape, leak, threshold, keep, 0.0f)) return 0;
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
  float *leak, *threshold; /* one, or one per channel, as Shape says; leak may be NULL */
} Leaving;

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

/* ds/du times the gradient that arrives at a spike; `relative` is u/threshold. */
INLINE float through_fire(float by_spike, float relative, float height) {
  const float z = relative - 1.0f, slope = 1.0f - (z < 0.0f ? -z : z);
  return by_spike * (slope > 0.0f ? slope : 0.0f) * height;
}

/* Gradients of a block at one timestep; `carried` is dL/du' at it, and dL/du' at the one before afterwards. */
typedef struct {
  float carried[BLOCK], shared[BLOCK], leak[BLOCK], threshold[BLOCK];
} Gradients;

/* `now` gets dL/dI of the timestep, added to what is there if the current lasts (`add`); `earlier` are potentials of the
 * timestep before, if there is one (`more`). */
INLINE void backward_step(const Pass *pass, const Block *b, float keep, const float *u, const float *earlier,
                          const float *by_spike, float *now, Gradients *g, const int add, const int more, const int own) {
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  const float *inverse = pass->inverse + b->first, *height = pass->height + b->first;
#pragma omp simd
  for (int64_t j = 0; j < b->size; j++) {
    /* z = u/threshold - 1, and the reset takes threshold * s from u'. */
    const float limit = threshold[own * j], relative = u[j] * inverse[own * j];
    const float fire = through_fire(by_spike[j], relative, height[own * j]);
    float carried = g->carried[j];
    g->threshold[j] -= fire * relative + (u[j] > limit ? carried : 0.0f);
    carried += fire;
    carried = carried > TINY || carried < -TINY ? carried : 0.0f;
    now[j] = (add ? now[j] : 0.0f) + carried;
    if (more) {
      carried *= keep;
      g->leak[j] += carried * (earlier[j] - (earlier[j] > limit ? limit : 0.0f));
      carried *= leak[own * j];
    }
    g->carried[j] = carried;
  }
}

/* `sums` is a row of leak's, then of threshold's, gradients; `scratch` holds S potentials and a row of zeros. */
INLINE void backward_block(const Pass *pass, const Block *b, const float *current, const float *before, const Arriving *in,
                           const Leaving *out, float *sums, float *scratch, const int own) {
  const int64_t size = b->size, all = pass->all, at = b->at, last = pass->shape.timesteps - 1;
  const int64_t repeat = pass->shape.repeat;
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  float *none = scratch + pass->shape.timesteps * size, membrane[BLOCK];
  Gradients g;
  rest(b, before, membrane);
  for (int64_t t = 0; t <= last; t++) {
    const float *now = current_at(pass, b, t, current);
    const float keep = keep_at(pass, t, b->sample);
    float *u = scratch + t * size;
    ahead(now, size);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      u[j] = leak[own * j] * keep * membrane[j] + now[j];
      membrane[j] = u[j] - (u[j] > threshold[own * j] ? threshold[own * j] : 0.0f);
    }
  }
  for (int64_t j = 0; j < size; j++) {
    g.carried[j] = in->after ? in->after[at + j] : 0.0f;
    g.shared[j] = g.leak[j] = g.threshold[j] = none[j] = 0.0f;
  }
  for (int64_t t = last; t >= 0; t--) {
    const float keep = keep_at(pass, t, b->sample), *u = scratch + t * size;
    const float *by_spike = in->spikes ? in->spikes + t * all + at : none;
    float *now = out->current + t / repeat * all + at;
    ahead(by_spike, size);
    ahead_to_write(now, size);
    if (in->potentials) /* arrives at u, which the reset hands on unchanged, as dL/du' would but for the threshold */
      for (int64_t j = 0; j < size; j++) {
        g.threshold[j] += u[j] > threshold[own * j] ? in->potentials[t * all + at + j] : 0.0f;
        g.carried[j] += in->potentials[t * all + at + j];
      }
    if (t && repeat == 1)
      backward_step(pass, b, keep, u, u - size, by_spike, now, &g, 0, 1, own);
    else if (t)
      backward_step(pass, b, keep, u, u - size, by_spike, g.shared, &g, 1, 1, own);
    else
      backward_step(pass, b, keep, u, 0, by_spike, g.shared, &g, 1, 0, own);
    if (t % repeat == 0 && (repeat > 1 || !t))
      for (int64_t j = 0; j < size; j++) {
        now[j] = g.shared[j];
        g.shared[j] = 0.0f;
      }
  }
  if (before) {
    const float keep = keep_at(pass, 0, b->sample);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      const float carried = g.carried[j] * keep;
      g.leak[j] += carried * before[at + j];
      out->before[at + j] = carried * leak[own * j];
    }
  }
  add_sums(sums + b->first, g.leak, size, own);
  add_sums(sums + pass->width + b->first, g.threshold, size, own);
}

/* The same for one fresh timestep without a membrane afterwards, which is most of what is trained. */
INLINE void backward_alone(const Pass *pass, const Block *b, const float *current, const Arriving *in, const Leaving *out,
                           float *sums, const int own) {
  const float *inverse = pass->inverse + b->first, *height = pass->height + b->first;
  const float *u = current + b->at, *by_spike = in->spikes + b->at;
  float *now = out->current + b->at, of_threshold[BLOCK];
  ahead(u, b->size);
  ahead(by_spike, b->size);
  ahead_to_write(now, b->size);
#pragma omp simd
  for (int64_t j = 0; j < b->size; j++) {
    const float relative = u[j] * inverse[own * j];
    now[j] = through_fire(by_spike[j], relative, height[own * j]);
    of_threshold[j] = -now[j] * relative;
  }
  add_sums(sums + pass->width + b->first, of_threshold, b->size, own);
}

INLINE void backward_any(const Pass *pass, const Block *b, const float *current, const float *before, const Arriving *in,
                         const Leaving *out, float *sums, float *scratch, const int own) {
  if (alone(pass, before) && in->spikes && !in->potentials && !in->after)
    backward_alone(pass, b, current, in, out, sums, own);
  else
    backward_block(pass, b, current, before, in, out, sums, scratch, own);
}

/* Adds up the groups' rows, and channels that share a parameter. */
static void gather(const Pass *pass, const float *sums, float *total, int64_t parameters) {
  for (int64_t i = 0; i < parameters; i++) total[i] = 0.0f;
  for (int64_t group = 0; group < pass->shape.groups; group++)
    for (int64_t i = 0; i < pass->width; i += parameters)
#pragma omp simd
      for (int64_t c = 0; c < parameters; c++) total[c] += sums[2 * pass->width * group + i + c];
}

/* Returns 0 where memory ran out. */
int lif_backward(const Shape *shape, const float *leak, const float *threshold, const float *keep, float gamma,
                 const float *current, const float *before, const float *by_spikes, const float *by_potentials,
                 const float *by_after, float *of_current, float *of_before, float *of_leak, float *of_threshold) {
  const Arriving in = {by_spikes, by_potentials, by_after};
  const Leaving out = {of_current, of_before, of_leak, of_threshold};
  Pass pass;
  if (!begin(&pass, shape, leak, threshold, keep, gamma)) return 0;
  const int64_t units = shape->batch * pass.pieces, room = (shape->timesteps + 1) * pass.block;
  float *sums = calloc(2 * shape->groups * pass.width, sizeof(float));
  float *scratch = malloc(shape->groups * room * sizeof(float));
  const int enough = sums && scratch;
  if (enough) {
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
    for (int64_t group = 0; group < shape->groups; group++) {
      float *row = sums + 2 * pass.width * group, *own = scratch + room * group;
      for (int64_t unit = units * group / shape->groups; unit < units * (group + 1) / shape->groups; unit++) {
        if (shape->own)
          EACH_BLOCK(&pass, unit, b, backward_any(&pass, &b, current, before, &in, &out, row, own, 1));
        else
          EACH_BLOCK(&pass, unit, b, backward_any(&pass, &b, current, before, &in, &out, row, own, 0));
      }
    }
    if (of_leak) gather(&pass, sums, of_leak, shape->leaks);
    gather(&pass, sums + pass.width, of_threshold, shape->thresholds);
  }
  free(scratch);
  free(sums);
  free(pass.leak);
  return enough;
}
