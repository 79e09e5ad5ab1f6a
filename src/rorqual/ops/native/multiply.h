/* Products of some tiles of a packed matrix with rows of activations: one thread's work. */
#ifndef RORQUAL_MULTIPLY_H
#define RORQUAL_MULTIPLY_H

#include <stddef.h>
#include <stdint.h>

#include "formats.h"

namespace rq {

// (rows, columns), packed; tile t begins at packed + t * TILE * row_bytes(kind, columns).
struct Matrix {
    int kind;
    int64_t rows, columns;
    const uint8_t *packed;
};

const Kernels &kernels();

// Bytes of a row of so many columns; 0 if the kind has no such width.
size_t row_bytes(int kind, int64_t columns);

// y[i * stride_y + j] = (or +=, if `adds`) row first + i of x times row 16 * tile + j of m, for j
// below 16 * num_tiles and within the matrix. A result does not depend on what is computed beside.
void multiply(const Matrix &m, int64_t tile, int64_t num_tiles, const Activations &x, int64_t first,
              int64_t count, float *y, int64_t stride_y, bool adds);

// The 16 rows of a tile as floats, `columns` each; those beyond the matrix's end are zeros.
void decode(const Matrix &m, int64_t tile, float *rows);

}  // namespace rq
#endif
