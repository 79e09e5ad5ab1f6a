/* Matrix kernels for CPUs: the C interface that Python calls, without its lock.
 *
 * A packed matrix is made of tiles of 16 output rows. Codes of four neighbouring inputs of a row
 * lie together, those of the 16 rows side by side, so that one instruction multiplies 64 codes
 * with four activations and no sum runs across lanes. A tile has the bytes that its rows had.
 */
#ifndef RORQUAL_NATIVE_H
#define RORQUAL_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define RQ_API __declspec(dllexport)
#else
#define RQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { RQ_ABI = 8 };
enum rq_kind { RQ_BF16 = 0, RQ_Q8_0 = 1, RQ_Q4_K = 2, RQ_Q6_K = 3, RQ_F32 = 4 };
enum rq_dtype { RQ_FLOAT32 = 0, RQ_BFLOAT16 = 1 };
enum rq_status { RQ_OK = 0, RQ_BAD_KIND = 1, RQ_BAD_SHAPE = 2, RQ_NO_MEMORY = 3, RQ_BAD_VALUE = 4 };

/* Changes with every change of this interface or of the packed forms. */
RQ_API int rq_abi(void);

/* "avx512", "avx2" or "portable": what the processor has, or less if RORQUAL_CPU says so. */
RQ_API const char *rq_level(void);

/* Threads of all later calls, the caller's among them. */
RQ_API void rq_set_threads(int num_threads);

/* libgomp's GOMP_parallel, omp_get_thread_num and omp_get_num_threads, where the caller computes on
 * its threads too. Without them the library has threads of its own. */
RQ_API void rq_use_openmp(void *parallel, void *thread_num, void *num_threads);

/* Bytes of a packed matrix (num_rows, num_columns); 0 if the kind has no such width. */
RQ_API size_t rq_packed_bytes(int kind, int64_t num_rows, int64_t num_columns);

/* Packs a matrix whose rows lie one after the other, as files store them (GGUF's types). */
RQ_API int rq_pack(int kind, const uint8_t *rows, uint8_t *packed, int64_t num_rows,
                   int64_t num_columns);

/* The bytes that `rq_pack` was given. */
RQ_API int rq_unpack(int kind, const uint8_t *packed, uint8_t *rows, int64_t num_rows,
                     int64_t num_columns);

/* Some rows of a matrix as floats, (num_ids, num_columns). */
RQ_API int rq_decode_rows(int kind, const uint8_t *packed, int64_t num_rows, int64_t num_columns,
                          const int64_t *ids, int64_t num_ids, float *rows);

/* The values of a packed matrix, row after row. */
RQ_API int rq_decode(int kind, const uint8_t *packed, float *rows, int64_t num_rows,
                     int64_t num_columns);

/* y (num_x, num_rows) = x (num_x, num_columns) W^T; both contiguous, of one dtype. Quantised kinds
 * round activations to 8 bits with a scale for each 32, BF16 to bfloat16, F32 keeps them. */
RQ_API int rq_linear(int kind, const uint8_t *packed, int64_t num_rows, int64_t num_columns,
                     const void *x, void *y, int64_t num_x, int dtype);

/* The same with a stack of matrices, packed one after the other: the next counts[e] rows of x are
 * multiplied with matrix e. */
RQ_API int rq_grouped(int kind, const uint8_t *packed, int64_t num_matrices, int64_t num_rows,
                      int64_t num_columns, const void *x, void *y, const int64_t *counts,
                      int dtype);

/* Rows of values to a block type of GGUF, `type` as ggml numbers it: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1
 * and Q2_K to Q6_K. `importance` of each column, above zero and of a mean of about one, weighs
 * squared errors; NULL: none. The same bytes for every instruction set. In the caller's thread.
 * RQ_BAD_VALUE: a value is not finite or too large for the type; what is in blocks then means
 * nothing. */
RQ_API int rq_encode(int type, const float *x, uint8_t *blocks, int64_t num_rows,
                     int64_t num_columns, const float *importance);

/* An operation of a training step (train.h), shared by the threads. */
RQ_API int rq_train(int operation, const void *arguments, int64_t num_items);

#ifdef __cplusplus
}
#endif
#endif
