#include "filter.h"

#include <math.h>
#include <string.h>

/* Keys' cubic convolution kernel, as written in PyTorch (UpSampleKernel.cpp): the order of operations is part of the
 * bits. */
static double cubic(double x) {
  const double a = -0.5;
  x = fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

typedef struct {
  double scale;   /* inputs per output */
  double support; /* inputs on each side of the centre that count */
  double inverse; /* to units of the kernel */
  int taps;
} shape;

static shape shape_of(int inputs, int outputs) {
  shape s;
  s.scale = (double)inputs / outputs;
  s.support = 2;
  s.inverse = 1;
  if (s.scale >= 1) {
    s.support = 2 * s.scale;
    s.inverse = 1 / s.scale;
  }
  s.taps = (int)ceil(s.support) * 2 + 1;
  return s;
}

static int even(int number) { return number + (number & 1); }

/* Bytes of a filter in the cache. */
static size_t bytes_of(int inputs, int outputs) {
  size_t numbers = (size_t)outputs * (size_t)(even(shape_of(inputs, outputs).taps) + 2);
  return (numbers * sizeof(int16_t) + 63) & ~(size_t)63;
}

/* The weights of output i in double precision, and where they begin. Returns their number. */
static int weigh(shape s, int inputs, int i, double *weights, int *first) {
  double center = s.scale * (i + 0.5);
  int low = (int)(center - s.support + 0.5);
  int high = (int)(center + s.support + 0.5);
  if (low < 0) low = 0;
  if (high > inputs) high = inputs;
  int length = high - low;
  if (length > s.taps) length = s.taps;
  double sum = 0;
  for (int k = 0; k < length; k++) {
    weights[k] = cubic((k + low - center + 0.5) * s.inverse);
    sum += weights[k];
  }
  for (int k = 0; k < length; k++) weights[k] /= sum;
  *first = low;
  return length;
}

/* The largest number of fractional bits with which all weights fit into 16 bits. */
static int precision_of(shape s, int inputs, int outputs, double *weights) {
  double largest = 0;
  int first;
  for (int i = 0; i < outputs; i++) {
    int length = weigh(s, inputs, i, weights, &first);
    for (int k = 0; k < length; k++)
      if (weights[k] > largest) largest = weights[k];
  }
  int precision = 0;
  while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
  return precision;
}

static int16_t rounded(double value) { return (int16_t)(value < 0 ? value - 0.5 : value + 0.5); }

static void build(vj_filter *filter, int inputs, int outputs, double *scratch, int16_t *memory) {
  shape s = shape_of(inputs, outputs);
  int taps = even(s.taps);
  int16_t *weights = memory;
  int16_t *first = memory + (size_t)outputs * (size_t)taps;
  int16_t *length = first + outputs;
  int precision = precision_of(s, inputs, outputs, scratch);
  memset(weights, 0, (size_t)outputs * (size_t)taps * sizeof *weights);
  for (int i = 0; i < outputs; i++) {
    int low;
    int n = weigh(s, inputs, i, scratch, &low);
    for (int k = 0; k < n; k++) weights[i * taps + k] = rounded(scratch[k] * (1 << precision));
    first[i] = (int16_t)low;
    length[i] = (int16_t)n;
  }
  *filter = (vj_filter){outputs, taps, precision, weights, first, length};
}

static const vj_filter *get(vj_filter_cache *cache, int inputs, int outputs) {
  if (cache->place[inputs] == 0) {
    vj_filter *filter = cache->filters + cache->count;
    build(filter, inputs, outputs, cache->scratch, (int16_t *)(cache->memory + cache->used));
    cache->used += bytes_of(inputs, outputs);
    cache->count++;
    cache->place[inputs] = cache->count;
  }
  return cache->filters + cache->place[inputs] - 1;
}

void vj_get_filters(vj_filter_cache *cache, int width, int height, int outputs, const vj_filter *filters[2]) {
  size_t bytes = bytes_of(width, outputs) + bytes_of(height, outputs);
  /* Two of the largest filters fit: (2 * 2 * 4096 + 4 * outputs) * 2 bytes each. A full cache starts again. */
  if (cache->outputs != outputs || cache->used + bytes > VJ_FILTER_BYTES) {
    memset(cache->place, 0, sizeof cache->place);
    cache->used = 0;
    cache->count = 0;
    cache->outputs = outputs;
  }
  filters[0] = get(cache, width, outputs);
  filters[1] = get(cache, height, outputs);
}
