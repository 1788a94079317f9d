/* Event-driven convolutions and linear maps on a CPU: what a silent input would add is never touched. Inputs, outputs and
 * their gradients are as they are STORED; weights, and all that is added up, are 32-bit floats.
 *
 * Of every active input (a spike, or a mean of spikes over a pool) the weights that lead away from it are added to the
 * outputs that it reaches.
 */
#include "event_lists.h"
#ifndef HALVES
#include "event_rows.h"
#endif

/* Cuts the work into units: groups of samples, which share the weights they have read; or parts of each sample, where
 * these are large, or fewer than threads. */
static int64_t cut(const Map *map, int64_t threads, int64_t number, Unit *unit) {
  const int64_t linear = map->rows * map->columns == 1, most = linear ? (map->outputs + 63) / 64 : map->rows;
  const int64_t bytes = map->rows * map->columns * map->outputs * (int64_t)sizeof(float);
  const int64_t parts = smaller(most, larger(map->batch >= threads ? 1 : threads, bytes / CACHED));
  const int64_t fair = (map->batch + threads - 1) / threads;
  const int64_t together = parts > 1 ? 1 : larger(1, smaller(smaller(CACHED / larger(1, bytes), fair), UINT16_MAX));
  const int64_t groups = (map->batch + together - 1) / together;
  if (unit) {
    const int64_t part = number % parts;
    unit->from = 0;
    unit->channels = map->channels;
    unit->sample = number / parts * together;
    unit->samples = smaller(together, map->batch - unit->sample);
    unit->row = linear ? 0 : map->rows * part / parts;
    unit->rows = linear ? 1 : map->rows * (part + 1) / parts;
    unit->first = linear ? map->outputs * part / parts : 0;
    unit->outputs = linear ? map->outputs * (part + 1) / parts - unit->first : map->outputs;
    unit->top = smaller(map->height, larger(0, unit->row * map->down - map->above));
    unit->bottom = larger(unit->top, smaller(map->height, (unit->rows - 1) * map->down - map->above + map->tall));
  }
  return groups * parts;
}

/* What a unit adds up in: the outputs themselves, or 32-bit floats that are stored in them afterwards. */
INLINE float *sums_of(const Map *map, Unit *unit, STORED *outputs) {
#ifdef HALVES
  (void)outputs;
  unit->origin = (unit->sample * map->rows + unit->row) * map->columns;
  return malloc(unit->samples * (unit->rows - unit->row) * map->columns * map->outputs * sizeof(float));
#else
  (void)map;
  unit->origin = 0;
  return outputs;
#endif
}

/* Returns 1; 0 where memory ran out. */
static int work(const Map *map, Unit *unit, const STORED *inputs, const float *weights, const float *bias,
                STORED *outputs, int32_t *counts) {
  const int32_t sum = places(unit, counts);
  Event *events = calloc(sum + 1, sizeof *events);
  float *sums = sums_of(map, unit, outputs);
  if (events && sums) {
    list(map, unit, inputs, counts, sum, events);
    for (int64_t sample = unit->sample; sample < unit->sample + unit->samples; sample++)
      for (int64_t place = unit->row * map->columns; place < unit->rows * map->columns; place++) {
        float *at = sums + (sample * map->rows * map->columns + place - unit->origin) * map->outputs + unit->first;
        if (bias)
          memcpy(at, bias + unit->first, unit->outputs * sizeof *bias);
        else
          memset(at, 0, unit->outputs * sizeof *at);
      }
    meet_all(map, unit, events, counts, (float *)weights, sums, NULL, 0);
  }
  free(events);
#ifdef HALVES
  const int64_t held = sums && events ? unit->samples * (unit->rows - unit->row) * map->columns : 0;
  for (int64_t place = 0; place < held; place++) { /* other channels are other units' */
    const float *at = sums + place * map->outputs + unit->first;
    STORED *to = outputs + (unit->origin + place) * map->outputs + unit->first;
#pragma omp simd
    for (int64_t j = 0; j < unit->outputs; j++) to[j] = WRITE(at[j]);
  }
  free(sums);
#endif
  return events && sums;
}

/* How a layer's own weights lie: the strides of (outputs, channels, rows, columns). */
typedef struct {
  int64_t outputs, channels, row, column;
} Strides;

#define TILE 16

/* Copies a tile of (outputs, channels) into one of (channels, outputs), or back. By way of a third one: the lines of
 * both lie powers of two apart, and throw each other out of the cache. */
INLINE void turn(float held[TILE][TILE], float *own, int64_t output, int64_t channel, float *there, int64_t next,
                 const int64_t channels, const int64_t outputs, const int back) {
  for (int64_t i = 0; i < (back ? channels : outputs); i++)
    for (int64_t j = 0; j < (back ? outputs : channels); j++)
      if (back)
        held[j][i] = there[i * next + j];
      else
        held[i][j] = own[i * output + j * channel];
  for (int64_t i = 0; i < (back ? outputs : channels); i++)
    for (int64_t j = 0; j < (back ? channels : outputs); j++)
      if (back)
        own[i * output + j * channel] = held[i][j];
      else
        there[i * next + j] = held[j][i];
}

/* Copies a layer's weights into the order in which `meet` reads them, or back. Places that no weight belongs to (of
 * steps behind the kernel's end) stay as they are. */
static void lay(const Map *map, int64_t threads, const Strides *own, float *layer, float *weights, const int back) {
  const int64_t across = map->across, steps = (map->wide + across - 1) / across, tiles = (map->channels + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t tap = 0; tap < map->tall * map->wide; tap++) {
      const int64_t row = tap / map->wide, column = tap % map->wide;
      const int64_t place = (row * across + column % across) * steps + steps - 1 - column / across;
      const int64_t next = map->tall * across * steps * map->outputs, last = smaller(map->channels, (tile + 1) * TILE);
      float *at = layer + row * own->row + column * own->column, *to = weights + place * map->outputs;
      for (int64_t first = 0; first < map->outputs; first += TILE) {
        const int64_t begin = tile * TILE, wide = last - begin, high = smaller(TILE, map->outputs - first);
        float held[TILE][TILE];
        float *from = at + first * own->outputs + begin * own->channels, *there = to + begin * next + first;
        if (wide == TILE && high == TILE && own->channels == 1)
          turn(held, from, own->outputs, 1, there, next, TILE, TILE, back);
        else
          turn(held, from, own->outputs, own->channels, there, next, wide, high, back);
      }
    }
}

/* Returns how many in a thousand of some inputs are active. */
int64_t events_density(const STORED *inputs, int64_t size, int64_t threads) {
  int64_t active = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : active)
  for (int64_t i = 0; i < size; i++) active += fires(inputs[i]);
  return 1000 * active / larger(1, size);
}

#define LOOKED_AT 128 /* pixels: enough to tell many from few without reading them all */

/* Returns how many in a thousand of the inputs (pixels, channels) are active in some of the pixels. Multiples of the
 * golden ratio, less their whole part, tell which: evenly spread, and in step with no size that a picture has. */
int64_t events_sample(const STORED *inputs, int64_t pixels, int64_t channels) {
  const uint64_t looked_at = smaller(pixels, LOOKED_AT), all = pixels;
  int64_t active = 0;
  for (uint64_t k = 0; k < looked_at; k++) {
    const uint32_t part = k * 0x9E3779B97F4A7C15u >> 32;
    const uint64_t pixel = all <= LOOKED_AT ? k : (uint64_t)part * all >> 32;
    for (int64_t c = 0; c < channels; c++) active += fires(inputs[pixel * channels + c]);
  }
  return 1000 * active / larger(1, (int64_t)looked_at * channels);
}

/* Returns 1; 0, with nothing of use written, where more inputs are active than may be or memory ran out.
 *
 * inputs (batch, height, width, channels), outputs (batch, rows, columns, outputs), bias (outputs) or NULL, weights
 * (channels, rows of the kernel, phases, steps, outputs) as `meet` reads them: they are there or, where `layer` is not
 * NULL, filled from it, the layer's own, when inputs are found to be few. `density` is told how many in a thousand
 * inputs are active, unless it is NULL. */
int events_run(const Map *map, int64_t threads, const STORED *inputs, const Strides *own, const float *layer,
               float *weights, const float *bias, STORED *outputs, int64_t *density) {
  const int64_t units = cut(map, threads, 0, NULL), room = (map->channels + LANES - 1) / LANES * LANES;
  int32_t *counts = malloc(units * room * sizeof *counts);
  if (!counts) return 0;
  int64_t active = 0, seen = 0, failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : active, seen)
  for (int64_t number = 0; number < units; number++) {
    Unit unit;
    cut(map, threads, number, &unit);
    count(map, &unit, inputs, counts + number * room);
    for (int64_t c = 0; c < map->channels; c++) active += counts[number * room + c];
    seen += unit.samples * (unit.bottom - unit.top) * map->width * map->channels;
  }
  const int few = 1000 * active <= map->most * seen;
  if (density) *density = 1000 * active / larger(1, seen);
  if (few) {
    if (layer) lay(map, threads, own, (float *)layer, weights, 0);
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : failed) schedule(dynamic)
    for (int64_t number = 0; number < units; number++) {
      Unit unit;
      cut(map, threads, number, &unit);
      failed += !work(map, &unit, inputs, weights, bias, outputs, counts + number * room);
    }
  }
  free(counts);
  return few && !failed;
}

#define TOGETHER (1 << 19) /* bytes of the outputs' gradients that all channels meet before the next ones */
#define GROUP 16           /* channels that a thread takes at a time */

/* Fills the gradients of a layer's weights, which lie as `own` says. Returns 1; 0, with nothing of use written, where
 * memory ran out.
 *
 * gradients (batch, rows, columns, outputs) of the outputs; `weights`, as `meet` reads them, is where they are added up,
 * in the order of the samples with any number of threads. */
int events_weigh(const Map *map, int64_t threads, const STORED *inputs, const STORED *gradients, const Strides *own,
                 float *layer, float *weights) {
  const int64_t stretch = map->tall * map->across * ((map->wide + map->across - 1) / map->across) * map->outputs;
  const int64_t bytes = map->rows * map->columns * map->outputs * (int64_t)sizeof(float);
  const int64_t together = larger(1, smaller(TOGETHER / larger(1, bytes), smaller(map->batch, UINT16_MAX)));
  const int64_t groups = (map->channels + GROUP - 1) / GROUP;
  int64_t failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : failed) schedule(dynamic)
  for (int64_t number = 0; number < groups; number++) {
    Unit unit = {.rows = map->rows, .outputs = map->outputs, .bottom = map->height, .from = number * GROUP};
    unit.channels = smaller(GROUP, map->channels - unit.from);
    memset(weights + unit.from * stretch, 0, unit.channels * stretch * sizeof *weights);
    for (unit.sample = 0; unit.sample < map->batch; unit.sample += together) {
      int32_t counts[GROUP];
      unit.samples = smaller(together, map->batch - unit.sample);
      count(map, &unit, inputs, counts);
      const int32_t sum = places(&unit, counts);
      Event *events = calloc(sum + 1, sizeof *events);
      if (!events) {
        failed++;
        break;
      }
      list(map, &unit, inputs, counts, sum, events);
      meet_all(map, &unit, events, counts, weights, NULL, gradients, 1);
      free(events);
    }
  }
  if (failed) return 0;
  lay(map, threads, own, layer, weights, 1);
  return 1;
}
