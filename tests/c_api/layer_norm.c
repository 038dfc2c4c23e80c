/* layer_norm through the C interface alone: values and gradients against formulae written out here in double, errors as
 * status and message, on every instruction set this machine has. Prints one line per failure; exits with their number. */
#include <fastformer.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 5, COLS = 37, STRIDE = 41 }; /* odd, no multiple of any vector; rows with a gap between them */

static int failures;

static void expect(int ok, const char* isa, const char* what) {
  if (ok) return;
  failures++;
  printf("%s: %s (last error: %s)\n", isa, what, ff_last_error());
}

static int close_to(const float* got, const double* want, int n) {
  for (int i = 0; i < n; i++)
    if (!(fabs(got[i] - want[i]) <= 1e-5 * (1 + fabs(want[i])))) return 0;
  return 1;
}

static void check_values(const char* isa) {
  static float x[ROWS * STRIDE], weight[COLS], bias[COLS], dout[ROWS * COLS];
  static float out[ROWS * COLS], mean[ROWS], rstd[ROWS], dx[ROWS * COLS], dweight[COLS], dbias[COLS];
  double want_out[ROWS * COLS], want_dx[ROWS * COLS], want_dweight[COLS] = {0}, want_dbias[COLS] = {0};
  const double eps = 1e-5;
  for (int i = 0; i < ROWS * STRIDE; i++) x[i] = (float)(sin(0.7 * i) * 3 + 1);
  for (int i = 0; i < ROWS * COLS; i++) dout[i] = (float)cos(1.3 * i);
  for (int c = 0; c < COLS; c++) weight[c] = 1 + 0.01f * (float)c, bias[c] = 0.5f - 0.02f * (float)c;

  for (int r = 0; r < ROWS; r++) {
    const float* row = x + r * STRIDE;
    const float* g = dout + r * COLS;
    double m = 0, var = 0, mean_wg = 0, mean_wgx = 0;
    for (int c = 0; c < COLS; c++) m += row[c] / (double)COLS;
    for (int c = 0; c < COLS; c++) var += (row[c] - m) * (row[c] - m) / COLS;
    double s = 1 / sqrt(var + eps);
    for (int c = 0; c < COLS; c++) {
      double normal = (row[c] - m) * s;
      want_out[r * COLS + c] = normal * weight[c] + bias[c];
      want_dweight[c] += g[c] * normal;
      want_dbias[c] += g[c];
      mean_wg += (double)weight[c] * g[c] / COLS;
      mean_wgx += (double)weight[c] * g[c] * normal / COLS;
    }
    for (int c = 0; c < COLS; c++)
      want_dx[r * COLS + c] = s * ((double)weight[c] * g[c] - mean_wg - (row[c] - m) * s * mean_wgx);
  }

  ff_layer_norm_args a = {.dtype = FF_FLOAT32, .param_dtype = FF_FLOAT32, .rows = ROWS, .cols = COLS,
                          .x_stride = STRIDE, .dout_stride = COLS, .eps = eps, .x = x, .weight = weight, .bias = bias,
                          .out = out, .mean = mean, .rstd = rstd, .dout = dout, .dx = dx, .dweight = dweight,
                          .dbias = dbias};
  expect(ff_cpu_layer_norm_forward(&a, NULL) == FF_OK, isa, "forward status");
  expect(close_to(out, want_out, ROWS * COLS), isa, "forward values");
  a.workspace = malloc(ff_cpu_layer_norm_backward_workspace(&a));
  expect(ff_cpu_layer_norm_backward(&a, NULL) == FF_OK, isa, "backward status");
  expect(close_to(dx, want_dx, ROWS * COLS), isa, "dx");
  expect(close_to(dweight, want_dweight, COLS), isa, "dweight");
  expect(close_to(dbias, want_dbias, COLS), isa, "dbias");
  free(a.workspace);

  a.weight = a.bias = NULL; /* switched off: 1 and 0 */
  for (int i = 0; i < ROWS * COLS; i++) want_out[i] = (want_out[i] - bias[i % COLS]) / weight[i % COLS];
  expect(ff_cpu_layer_norm_forward(&a, NULL) == FF_OK, isa, "forward status without weight and bias");
  expect(close_to(out, want_out, ROWS * COLS), isa, "forward values without weight and bias");
}

static void check_errors(const char* isa) {
  float x[4] = {1, 2, 3, 4}, out[4] = {7, 7, 7, 7}, mean[1], rstd[1];
  ff_layer_norm_args a = {.dtype = FF_FLOAT32, .param_dtype = FF_FLOAT32, .rows = 1, .cols = 4, .x_stride = 4,
                          .eps = -1, .x = x, .out = out, .mean = mean, .rstd = rstd};
  expect(ff_cpu_layer_norm_forward(&a, NULL) == FF_INVALID_ARGUMENT, isa, "a negative eps is refused");
  expect(strstr(ff_last_error(), "eps") != NULL, isa, "the message names eps");
  a.eps = 1e-5, a.x = NULL;
  expect(ff_cpu_layer_norm_forward(&a, NULL) == FF_INVALID_ARGUMENT, isa, "a NULL x is refused");
  expect(out[0] == 7 && out[3] == 7, isa, "a refused call writes nothing");
  a.x = x, a.rows = 0;
  expect(ff_cpu_layer_norm_forward(&a, NULL) == FF_OK, isa, "no rows is no error");
  expect(ff_cpu_set_isa("sse9") == FF_INVALID_ARGUMENT, isa, "an unknown instruction set is refused");
}

int main(void) {
  const char* isas[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int i = 0; i < 5; i++) {
    if (ff_cpu_set_isa(isas[i]) != FF_OK) continue;
    expect(!strcmp(ff_cpu_isa(), isas[i]), isas[i], "ff_cpu_isa() names what was set");
    check_values(isas[i]);
    check_errors(isas[i]);
    printf("checked %s\n", isas[i]);
  }
  return failures;
}
