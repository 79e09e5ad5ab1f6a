// Activations as products read them. Included by products.inl.
//
// A word is what one instruction multiplies with 32 bits of each weight row: four codes, a pair of
// bfloat16, a float. Quantised ones have a scale for each 32 codes, and extras: what a kind wants
// beside (where its sums begin, or what a minimum is multiplied with).

constexpr int64_t CHUNK = SUPER;

// A thread's memory, that grows and stays.
class Room {
  public:
    void *of(int64_t size) {
        if (size > size_) {
            bytes_.reset(new uint8_t[size + 64]);
            size_ = size;
        }
        const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.get());
        return reinterpret_cast<void *>((at + 63) & ~static_cast<uintptr_t>(63));
    }

  private:
    std::unique_ptr<uint8_t[]> bytes_;
    int64_t size_ = 0;
};

// Rows where they lie.
struct Rows {
    const uint8_t *values;
    const float *scales;
    const int32_t *extras;
    int64_t row_bytes, row_scales, row_extras;

    const void *word(int64_t k, int r) const { return values + r * row_bytes + 4 * k; }
    const void *scale(int64_t g, int r) const { return scales + r * row_scales + g; }
    const void *extra(int64_t i, int r) const { return extras + r * row_extras + i; }

    Rows from_row(int64_t r) const {
        return {values + r * row_bytes, scales + r * row_scales, extras + r * row_extras,
                row_bytes, row_scales, row_extras};
    }
    template <class Kind>
    Rows from_chunk(int64_t c) const {
        return {values + c * Kind::WORDS * 4, scales + c * Kind::SCALES, extras + c * Kind::EXTRAS,
                row_bytes, row_scales, row_extras};
    }
};

template <class Kind>
static Rows rows_of(const Activations &x, int64_t first, int64_t num) {
    static thread_local Room room;
    const int64_t row_bytes = x.stride * 4 / Kind::VALUES, row_scales = x.stride / GROUP;
    const int64_t row_extras = (x.width + CHUNK - 1) / CHUNK * Kind::EXTRAS;
    const uint8_t *values = static_cast<const uint8_t *>(Kind::values(x)) + first * row_bytes;
    if (Kind::EXTRAS == 0) return {values, nullptr, nullptr, row_bytes, 0, 0};
    const float *scales = x.scales + first * row_scales;
    int32_t *extras = static_cast<int32_t *>(room.of(num * row_extras * 4));
    for (int64_t i = 0; i < num; i++)
        Kind::fill(scales + i * row_scales, x.sums + (first + i) * (x.stride / 16),
                   x.width / GROUP, extras + i * row_extras);
    return {values, scales, extras, row_bytes, row_scales, row_extras};
}
