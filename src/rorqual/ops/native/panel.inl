// Activations in the order in which products read them. Included by products.inl.
//
// A word is what one instruction multiplies with 32 bits of each weight row: four codes, a pair of
// bfloat16, a float. Words of R rows lie side by side; so do their scales, and what a kind wants
// beside them. Chunks of 256 columns follow each other, within one the groups of R rows.

constexpr int64_t CHUNK = SUPER;

struct Panel {
    const int32_t *words;  // [words of a chunk][R]
    const float *scales;   // [groups of a chunk][R]
    const int32_t *sums;   // [groups, or halves of groups][R]: where sums begin
    const float *offsets;  // [groups][R]: -scale * sum of codes
};

// A thread's memory for panels: it grows, and stays.
class Room {
  public:
    void *of(size_t size) {
        if (size > size_) {
            bytes_.reset(new uint8_t[size + 64]);
            size_ = size;
        }
        const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.get());
        return reinterpret_cast<void *>((at + 63) & ~static_cast<uintptr_t>(63));
    }

  private:
    std::unique_ptr<uint8_t[]> bytes_;
    size_t size_ = 0;
};

template <class Kind>
class Panels {
  public:
    // Memory for so many rows, which `fill` writes.
    Panels(int64_t num_rows, int64_t width) : num_rows_(num_rows) {
        static thread_local Room room;
        const int64_t num = num_rows * ((width + CHUNK - 1) / CHUNK);
        const int64_t per_row = Kind::WORDS + Kind::SCALES + Kind::SUMS + Kind::OFFSETS;
        words_ = static_cast<int32_t *>(room.of(num * per_row * 4));
        scales_ = reinterpret_cast<float *>(words_ + num * Kind::WORDS);
        sums_ = reinterpret_cast<int32_t *>(scales_ + num * Kind::SCALES);
        offsets_ = reinterpret_cast<float *>(sums_ + num * Kind::SUMS);
    }

    // Rows [row, row + num) of x as rows [at, at + R); those beyond num are zeros.
    template <int R>
    void fill(const Activations &x, int64_t row, int64_t num, int64_t at) {
        const int64_t row_bytes = x.stride * 4 / Kind::VALUES;
        const uint8_t *from = static_cast<const uint8_t *>(Kind::values(x)) + row * row_bytes;
        for (int64_t c = 0; c * CHUNK < x.width; c++) {
            const int64_t left = x.width - c * CHUNK, columns = left < CHUNK ? left : CHUNK;
            const int64_t place = c * num_rows_ + at;
            fill_words<R>(from + c * Kind::WORDS * 4, row_bytes, num, columns / Kind::VALUES,
                          words_ + place * Kind::WORDS);
            if (Kind::SCALES > 0)
                Kind::template fill<R>(x, row, num, c * CHUNK, columns,
                                       scales_ + place * Kind::SCALES, sums_ + place * Kind::SUMS,
                                       offsets_ + place * Kind::OFFSETS);
        }
    }

    Panel at(int64_t chunk, int64_t row) const {
        const int64_t place = chunk * num_rows_ + row;
        return {words_ + place * Kind::WORDS, scales_ + place * Kind::SCALES,
                sums_ + place * Kind::SUMS, offsets_ + place * Kind::OFFSETS};
    }

  private:
    template <int R>
    static void fill_words(const uint8_t *from, int64_t row_bytes, int64_t num, int64_t num_words,
                           int32_t *words) {
        int64_t k = 0;
        if (R == 8 && num == 8)
            for (; k + 8 <= num_words; k += 8)
                Simd::transpose_words(from + 4 * k, row_bytes, words + k * R);
        for (int r = 0; r < R; r++)
            for (int64_t i = k; i < num_words; i++) {
                words[i * R + r] = 0;
                if (r < num) memcpy(words + i * R + r, from + r * row_bytes + 4 * i, 4);
            }
    }

    int64_t num_rows_;
    int32_t *words_, *sums_;
    float *scales_, *offsets_;
};

// Scales and sums of rows of quantised activations: for each group of 32, or for each half, sums
// begin at `excess` times the sum of the codes; `offsets` may be null.
template <int R, int SUMS_A_GROUP>
static inline void fill_groups(const Activations &x, int64_t row, int64_t num, int64_t column,
                               int64_t columns, int32_t excess, float *scales, int32_t *sums,
                               float *offsets) {
    for (int r = 0; r < R; r++) {
        const float *of_scales = x.scales + ((row + r) * x.stride + column) / GROUP;
        const int32_t *of_sums = x.sums + ((row + r) * x.stride + column) / 16;
        for (int64_t g = 0; g < columns / GROUP; g++) {
            const float scale = r < num ? of_scales[g] : 0;
            const int32_t a = r < num ? of_sums[2 * g] : 0, b = r < num ? of_sums[2 * g + 1] : 0;
            scales[g * R + r] = scale;
            if (SUMS_A_GROUP == 1) sums[g * R + r] = excess * (a + b);
            if (SUMS_A_GROUP == 2) {
                sums[2 * g * R + r] = excess * a;
                sums[(2 * g + 1) * R + r] = excess * b;
            }
            if (offsets != nullptr) offsets[g * R + r] = -scale * static_cast<float>(a + b);
        }
    }
}
