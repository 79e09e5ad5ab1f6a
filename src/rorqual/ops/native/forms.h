/* Rows of activations in the forms that products want. */
#ifndef RORQUAL_FORMS_H
#define RORQUAL_FORMS_H

#include <string.h>

#include <memory>

#include "multiply.h"
#include "rorqual_native.h"
#include "vector.h"

namespace rq {

enum Form { FORM_CODES = 1, FORM_PAIRS = 2, FORM_FLOATS = 4 };

inline int form_of(int64_t kind) {
    return kind == RQ_BF16 ? FORM_PAIRS : kind == RQ_F32 ? FORM_FLOATS : FORM_CODES;
}

// Memory that only grows, and is not cleared.
template <class T>
class Buffer {
  public:
    void reserve(int64_t size) {
        if (size <= size_) return;
        data_.reset();
        size_ = 0;
        data_.reset(new T[size]);
        size_ = size;
    }
    T *data() const { return data_.get(); }
    operator T *() const { return data_.get(); }

  private:
    std::unique_ptr<T[]> data_;
    int64_t size_ = 0;
};

class Rows {
  public:
    // `forms` of Form, all that are wanted of these rows.
    void reserve(int forms, int64_t num, int64_t width) {
        forms_ = forms;
        width_ = width;
        if (forms & FORM_CODES) {
            codes_.reserve(num * width);
            scales_.reserve(num * width / GROUP);
            sums_.reserve(num * width / 16);
        }
        if (forms & FORM_PAIRS) pairs_.reserve(num * width);
        if (forms & FORM_FLOATS) floats_.reserve(num * width);
    }

    void put(int64_t row, const float *values) { put_part(row, 0, width_, values); }

    // Columns [column, column + num); where codes are wanted, whole groups of 32.
    void put_part(int64_t row, int64_t column, int64_t num, const float *values) {
        const int64_t at = row * width_ + column;
        if (forms_ & FORM_CODES)
            kernels().quantise(values, num, codes_ + at, scales_ + at / GROUP, sums_ + at / 16);
        if (forms_ & FORM_PAIRS) row_kernels().narrow(values, num, pairs_ + at);
        if (forms_ & FORM_FLOATS) memcpy(floats_ + at, values, num * sizeof(float));
    }

    // The forms of these rows, of a row of rows that have them too.
    void copy(int64_t row, const Rows &from, int64_t from_row) {
        const int64_t to = row * width_, at = from_row * width_;
        if (forms_ & FORM_CODES) {
            memcpy(codes_ + to, from.codes_ + at, width_);
            memcpy(scales_ + to / GROUP, from.scales_ + at / GROUP, width_ / GROUP * sizeof(float));
            memcpy(sums_ + to / 16, from.sums_ + at / 16, width_ / 16 * sizeof(int32_t));
        }
        if (forms_ & FORM_PAIRS) memcpy(pairs_ + to, from.pairs_ + at, width_ * sizeof(uint16_t));
        if (forms_ & FORM_FLOATS) memcpy(floats_ + to, from.floats_ + at, width_ * sizeof(float));
    }

    // Every `every`-th row from `row` on.
    Activations view(int64_t row = 0, int64_t every = 1) const {
        const int64_t at = row * width_;
        Activations x{};
        if (forms_ & FORM_CODES) {
            x.codes = codes_ + at;
            x.scales = scales_ + at / GROUP;
            x.sums = sums_ + at / 16;
        }
        if (forms_ & FORM_PAIRS) x.pairs = pairs_ + at;
        if (forms_ & FORM_FLOATS) x.floats = floats_ + at;
        x.width = width_;
        x.stride = width_ * every;
        return x;
    }

  private:
    int forms_ = 0;
    int64_t width_ = 0;
    Buffer<int8_t> codes_;
    Buffer<float> scales_, floats_;
    Buffer<int32_t> sums_;
    Buffer<uint16_t> pairs_;
};

}  // namespace rq
#endif
