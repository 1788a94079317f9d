/* The second part of lif_scan.c. `own` and `once` are constants wherever these are called, so that each of their values
 * gets loops of its own. */

INLINE const STORED *current_at(const Pass *pass, const Block *b, int64_t t, const STORED *current) {
  return current + t / pass->shape.repeat * pass->all + b->at;
}

INLINE void forward_block(const Pass *pass, const Block *b, const STORED *current, const float *before, STORED *spikes,
                          float *potentials, float *after, const int own, const int once) {
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  if (alone(pass, before) && !potentials && !after) {
    const STORED *now = current + b->at;
    STORED *spike = spikes + b->at;
    ahead(now, b->size * sizeof *now, 0);
    ahead(spike, b->size * sizeof *spike, 1);
#pragma omp simd
    for (int64_t j = 0; j < b->size; j++) spike[j] = WRITE(READ(now[j]) > threshold[own * j] ? 1.0f : 0.0f);
    return;
  }
  float membrane[BLOCK], spent[BLOCK];
  rest(b, before, membrane);
  if (once)
    for (int64_t j = 0; j < b->size; j++) spent[j] = 0.0f;
  for (int64_t t = 0; t < pass->shape.timesteps; t++) {
    const STORED *now = current_at(pass, b, t, current);
    const float keep = keep_at(pass, t, b->sample);
    STORED *spike = spikes + t * pass->all + b->at;
    ahead(now, b->size * sizeof *now, 0);
    ahead(spike, b->size * sizeof *spike, 1);
    if (potentials) {
      float *potential = potentials + t * pass->all + b->at;
      for (int64_t j = 0; j < b->size; j++) potential[j] = leak[own * j] * keep * membrane[j] + READ(now[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < b->size; j++) {
      const float u = leak[own * j] * keep * membrane[j] + READ(now[j]), limit = threshold[own * j];
      const float fired = u > limit ? (once ? 1.0f - spent[j] : 1.0f) : 0.0f;
      if (once) spent[j] += fired;
      spike[j] = WRITE(fired);
      membrane[j] = u - (fired > 0.0f ? limit : 0.0f);
    }
  }
  if (after)
    for (int64_t j = 0; j < b->size; j++) after[b->at + j] = membrane[j];
}

/* Returns 0 where memory ran out. */
int lif_forward(const Shape *shape, const float *leak, const float *threshold, const float *keep, const STORED *current,
                const float *before, STORED *spikes, float *potentials, float *after) {
  Pass pass;
  if (!begin(&pass, shape, leak, threshold, keep, 0.0f)) return 0;
#pragma omp parallel for num_threads(shape->threads) if (shape->threads > 1)
  for (int64_t unit = 0; unit < shape->batch * pass.pieces; unit++) {
    EACH_BLOCK(&pass, unit, b,
               WITH_CONSTANTS(shape, forward_block, &pass, &b, current, before, spikes, potentials, after));
  }
  free(pass.leak);
  return 1;
}

typedef struct {
  const STORED *spikes; /* gradients that arrive; each may be NULL */
  const float *potentials, *after;
} Arriving;

typedef struct {
  STORED *current; /* gradients that leave; all but those of current and threshold may be NULL */
  float *before;
  float *leak, *threshold; /* one, or one per channel, as Shape says */
} Leaving;

/* `now` gets dL/dI of the timestep; if the current lasts (`add`), what it adds up to goes on in `g`. `earlier` are
 * potentials of the timestep before, if there is one (`more`). */
INLINE void backward_step(const Pass *pass, const Block *b, int64_t t, const float *u, const float *earlier,
                          const STORED *by_spike, STORED *now, Gradients *g, const int add, const int more,
                          const int own, const int once) {
  const float keep = keep_at(pass, t, b->sample);
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  const float *inverse = pass->inverse + b->first, *height = pass->height + b->first;
#pragma omp simd
  for (int64_t j = 0; j < b->size; j++) {
    /* z = u/threshold - 1, and the reset takes threshold * s from u'. */
    const float limit = threshold[own * j], relative = u[j] * inverse[own * j];
    /* What has fired already hears nothing from its later spikes, which were none. */
    const float arriving = once && g->when[j] < (float)t ? 0.0f : READ(by_spike[j]);
    const float fire = through_fire(arriving, relative, height[own * j]);
    float carried = g->carried[j];
    g->threshold[j] -= fire * relative + (fires(u[j], limit, g->when[j], t, once) ? carried : 0.0f);
    carried += fire;
    carried = carried < TINY && carried > -TINY ? 0.0f : carried; /* what is no number stays none */
    if (add)
      g->shared[j] += carried;
    else
      now[j] = WRITE(carried);
    if (more) {
      carried *= keep;
      g->leak[j] += carried * (earlier[j] - (fires(earlier[j], limit, g->when[j], t - 1, once) ? limit : 0.0f));
      carried *= leak[own * j];
    }
    g->carried[j] = carried;
  }
}

/* `sums` is a row of leak's, then of threshold's, gradients; `scratch` holds S potentials and a row of zeros. */
INLINE void backward_block(const Pass *pass, const Block *b, const STORED *current, const float *before,
                           const Arriving *in, const Leaving *out, float *sums, float *scratch, const int own,
                           const int once) {
  const int64_t size = b->size, all = pass->all, at = b->at, last = pass->shape.timesteps - 1;
  const int64_t repeat = pass->shape.repeat;
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  float *none = scratch + pass->shape.timesteps * size, membrane[BLOCK];
  Gradients g;
  rest(b, before, membrane);
  if (once)
    for (int64_t j = 0; j < size; j++) g.when[j] = (float)(last + 1);
  for (int64_t t = 0; t <= last; t++) {
    const STORED *now = current_at(pass, b, t, current);
    const float keep = keep_at(pass, t, b->sample);
    float *u = scratch + t * size;
    ahead(now, size * sizeof *now, 0);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      u[j] = leak[own * j] * keep * membrane[j] + READ(now[j]);
      const float limit = threshold[own * j];
      if (once) g.when[j] = u[j] > limit && g.when[j] > (float)t ? (float)t : g.when[j];
      membrane[j] = u[j] - (fires(u[j], limit, g.when[j], t, once) ? limit : 0.0f);
    }
  }
  for (int64_t j = 0; j < size; j++) {
    g.carried[j] = in->after ? in->after[at + j] : 0.0f;
    g.shared[j] = g.leak[j] = g.threshold[j] = none[j] = 0.0f;
  }
  for (int64_t t = last; t >= 0; t--) {
    const float *u = scratch + t * size;
    const STORED *by_spike = in->spikes ? in->spikes + t * all + at : (const STORED *)none; /* 0 has no bits set */
    STORED *now = out->current + t / repeat * all + at;
    ahead(by_spike, size * sizeof *by_spike, 0);
    ahead(now, size * sizeof *now, 1);
    if (in->potentials) /* arrives at u, which the reset hands on unchanged, as dL/du' would but for the threshold */
      for (int64_t j = 0; j < size; j++) {
        const int fired = fires(u[j], threshold[own * j], g.when[j], t, once);
        g.threshold[j] += fired ? in->potentials[t * all + at + j] : 0.0f;
        g.carried[j] += in->potentials[t * all + at + j];
      }
    if (t && repeat == 1)
      backward_step(pass, b, t, u, u - size, by_spike, now, &g, 0, 1, own, once);
    else if (t)
      backward_step(pass, b, t, u, u - size, by_spike, now, &g, 1, 1, own, once);
    else
      backward_step(pass, b, t, u, 0, by_spike, now, &g, 1, 0, own, once);
    if (t % repeat == 0 && (repeat > 1 || !t))
      for (int64_t j = 0; j < size; j++) {
        now[j] = WRITE(g.shared[j]);
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
INLINE void backward_alone(const Pass *pass, const Block *b, const STORED *current, const Arriving *in,
                           const Leaving *out, float *sums, const int own) {
  const float *inverse = pass->inverse + b->first, *height = pass->height + b->first;
  const STORED *u = current + b->at, *by_spike = in->spikes + b->at;
  STORED *now = out->current + b->at;
  ahead(u, b->size * sizeof *u, 0);
  ahead(by_spike, b->size * sizeof *by_spike, 0);
  ahead(now, b->size * sizeof *now, 1);
  float *of_threshold = sums + pass->width + b->first, total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < b->size; j++) {
    const float relative = READ(u[j]) * inverse[own * j];
    const float fire = through_fire(READ(by_spike[j]), relative, height[own * j]);
    now[j] = WRITE(fire);
    if (own)
      of_threshold[j] -= fire * relative;
    else
      total -= fire * relative;
  }
  if (!own) *of_threshold += total;
}

/* The same for a few fresh timesteps, as many as the constant `steps`: they stay in registers. */
INLINE void backward_few(const Pass *pass, const Block *b, const STORED *current, const Arriving *in,
                         const Leaving *out, float *sums, const int own, const int lasts, const int steps) {
  const float *leak = pass->leak + b->first, *threshold = pass->threshold + b->first;
  const float *inverse = pass->inverse + b->first, *height = pass->height + b->first;
  const int64_t size = b->size, all = pass->all, bytes = size * sizeof *current;
  const STORED *now = current + b->at, *by_spike = in->spikes + b->at;
  STORED *leaves = out->current + b->at;
  float of_leak[BLOCK], of_threshold[BLOCK];
  for (int t = 0; t < steps; t++) {
    ahead(by_spike + t * all, bytes, 0);
    if (t && lasts) continue;
    ahead(now + t * all, bytes, 0);
    ahead(leaves + t * all, bytes, 1);
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < size; j++) {
    const float limit = threshold[own * j], decay = leak[own * j];
    float u[MOST], reset[MOST], membrane = 0.0f, carried = 0.0f, shared = 0.0f, leaking = 0.0f, total = 0.0f;
#pragma GCC unroll 8
    for (int t = 0; t < steps; t++) {
      u[t] = decay * membrane + READ(now[(lasts ? 0 : t) * all + j]);
      reset[t] = u[t] > limit ? limit : 0.0f;
      membrane = u[t] - reset[t];
    }
#pragma GCC unroll 8
    for (int t = steps - 1; t >= 0; t--) {
      const float relative = u[t] * inverse[own * j];
      const float fire = through_fire(READ(by_spike[t * all + j]), relative, height[own * j]);
      total -= fire * relative + (u[t] > limit ? carried : 0.0f);
      carried += fire;
      carried = carried < TINY && carried > -TINY ? 0.0f : carried; /* what is no number stays none */
      if (lasts)
        shared += carried;
      else
        leaves[t * all + j] = WRITE(carried);
      if (t) {
        leaking += carried * (u[t - 1] - reset[t - 1]);
        carried *= decay;
      }
    }
    if (lasts) leaves[j] = WRITE(shared);
    of_leak[j] = leaking;
    of_threshold[j] = total;
  }
  add_sums(sums + b->first, of_leak, size, own);
  add_sums(sums + pass->width + b->first, of_threshold, size, own);
}

/* Each of them is a function to the compiler too: as parts of one it takes four times as long. */
typedef void Few(const Pass *, const Block *, const STORED *, const Arriving *, const Leaving *, float *);

#define FEW(own, lasts, steps)                                                                                        \
  static __attribute__((noinline)) void few##own##lasts##steps(                                                       \
      const Pass *pass, const Block *b, const STORED *current, const Arriving *in, const Leaving *out, float *sums) { \
    backward_few(pass, b, current, in, out, sums, own, lasts, steps);                                                 \
  }
#define EACH_FEW(own, lasts) FEW(own, lasts, 2) FEW(own, lasts, 3) FEW(own, lasts, 4) FEW(own, lasts, 5)
EACH_FEW(0, 0)
EACH_FEW(0, 1)
EACH_FEW(1, 0)
EACH_FEW(1, 1)

/* By whether neurons have parameters of their own, whether the current lasts, and timesteps from two on. */
static Few *const all_few[2][2][MOST - 1] = {
    {{few002, few003, few004, few005}, {few012, few013, few014, few015}},
    {{few102, few103, few104, few105}, {few112, few113, few114, few115}},
};
#undef FEW
#undef EACH_FEW

INLINE void backward_any(const Pass *pass, const Block *b, const STORED *current, const float *before,
                         const Arriving *in, const Leaving *out, float *sums, float *scratch, const int own,
                         const int once) {
  if (alone(pass, before) && in->spikes && !in->potentials && !in->after)
    backward_alone(pass, b, current, in, out, sums, own);
  else if (few(pass, before) && !once && in->spikes && !in->potentials && !in->after && out->leak)
    all_few[own][pass->shape.repeat > 1][pass->shape.timesteps - 2](pass, b, current, in, out, sums);
  else
    backward_block(pass, b, current, before, in, out, sums, scratch, own, once);
}

/* Returns 0 where memory ran out. */
int lif_backward(const Shape *shape, const float *leak, const float *threshold, const float *keep, float gamma,
                 const STORED *current, const float *before, const STORED *by_spikes, const float *by_potentials,
                 const float *by_after, STORED *of_current, float *of_before, float *of_leak, float *of_threshold) {
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
        EACH_BLOCK(&pass, unit, b,
                   WITH_CONSTANTS(shape, backward_any, &pass, &b, current, before, &in, &out, row, own));
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
