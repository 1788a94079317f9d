/* A linear map of a few frames, from its own weights: of every output's row only the active inputs' are read.
 *
 * A single decision does not pay for another copy of the weights, and its timesteps read the same ones: an input that
 * is active in any frame is multiplied by all of them, which are the lanes of one vector.
 */
#include "event_lists.h"

#define FRAMES 8
#define ROWS 4 /* outputs at a time: sums that wait for each other would take four times as long */

typedef float Frames __attribute__((vector_size(4 * FRAMES), aligned(4), may_alias));

INLINE void read_rows(const float *row, int64_t channels, const int32_t *which, const Frames *amounts, int64_t active,
                      Frames *sums, const int64_t rows) {
  Frames sum[ROWS] = {{0}};
  for (int64_t k = 0; k < active; k++)
    for (int64_t r = 0; r < rows; r++) sum[r] += amounts[k] * row[r * channels + which[k]];
  for (int64_t r = 0; r < rows; r++) sums[r] = sum[r];
}

/* Returns 1; 0, with nothing written, where more than `most` in a thousand inputs are active in any frame or memory ran
 * out. inputs (frames, channels), at most FRAMES of them; weights (outputs, channels); bias (outputs) or NULL. */
int events_rows(int64_t frames, int64_t channels, int64_t outputs, int64_t most, int64_t threads, const float *inputs,
                const float *weights, const float *bias, float *results) {
  int32_t *which = malloc(channels * sizeof *which + 1);
  Frames *amounts = NULL;
  int64_t active = 0;
  if (!which) return 0;
  for (int64_t c = 0; c < channels; c++) {
    int any = 0;
    for (int64_t f = 0; f < frames; f++) any |= fires(inputs[f * channels + c]);
    which[active] = (int32_t)c;
    active += any;
  }
  const int few = 1000 * active <= most * channels && (amounts = calloc(active + 1, sizeof *amounts));
  if (few) {
    for (int64_t k = 0; k < active; k++)
      for (int64_t f = 0; f < frames; f++) amounts[k][f] = inputs[f * channels + which[k]];
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < outputs; first += ROWS) {
      const int64_t rows = smaller(ROWS, outputs - first);
      const float *row = weights + first * channels;
      Frames sums[ROWS];
      if (rows == ROWS)
        read_rows(row, channels, which, amounts, active, sums, ROWS);
      else
        read_rows(row, channels, which, amounts, active, sums, rows);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t f = 0; f < frames; f++)
          results[f * outputs + first + r] = sums[r][f] + (bias ? bias[first + r] : 0);
    }
  }
  free(amounts);
  free(which);
  return few;
}
