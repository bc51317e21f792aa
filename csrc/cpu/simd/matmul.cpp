#include "cpu/simd/matmul.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

// The instructions that the product of bfloat16 needs, beyond those of its capability. A lambda
// does not have those of the function that it stands in.
#if DLOPS_CAPABILITY == 2
#define DLOPS_TARGET __attribute__((target("avx512bf16")))
#else
#define DLOPS_TARGET
#endif

namespace dlops::cpu {
namespace {

template <class T>
using Vec = at::vec::Vectorized<T>;

// A tile of sums stays in registers, of which AVX-512 has 32 and others 16: at most so many vectors
// of columns, and rows as long as there are registers.
constexpr int kWidest = DLOPS_CAPABILITY == 2 ? 4 : 3;
constexpr int kTallest = 12;
constexpr int rows_of(int vectors) {
  const int sums = DLOPS_CAPABILITY == 2 ? 24 : 12;
  return std::min(kTallest, sums / vectors);
}
// The size of a part where `count` is cut into as few as possible, of at most `most` and about
// the same size.
int64_t even_part(int64_t count, int64_t most) {
  const int64_t parts = (count + most - 1) / most;
  return (count + parts - 1) / parts;
}

// What a register holds of A and B, of one term or of a pair of them.
template <class T>
struct Operand {
  using sum_t = T;
  using Register = Vec<T>;
  static constexpr int64_t kStep = 1;
  static Register spread(const T* a) { return Vec<T>(*a); }
  static Register load(const T* b) { return Vec<T>::loadu(b); }
  static Vec<T> add(Register a, Register b, Vec<T> sum) { return at::vec::fmadd(a, b, sum); }
};

#if DLOPS_CAPABILITY == 2
template <>
struct Operand<c10::BFloat16> {
  using sum_t = float;
  using Register = __m512i;
  static constexpr int64_t kStep = 2;
  static Register spread(const c10::BFloat16* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Register load(const c10::BFloat16* b) { return _mm512_loadu_si512(b); }
  // An error where it cannot be inlined: a call for each vector takes five times as long.
  [[gnu::always_inline]] DLOPS_TARGET static Vec<float> add(Register a, Register b,
                                                            Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  [[gnu::always_inline]] DLOPS_TARGET static void store(Vec<float> sum, c10::BFloat16* to,
                                                        int64_t count) {
    const auto whole = static_cast<__mmask16>((1U << count) - 1);
    _mm256_mask_storeu_epi16(to, whole, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
};
#endif

template <class T>
struct Tile {
  using sum_t = typename Operand<T>::sum_t;
  int64_t width, terms;  // of each of the factors
  const Factors<T>* factors;
  int64_t count;
  int64_t a, b;  // where the tile begins in theirs
  int64_t lda, step, ldb;
  sum_t* c;
  int64_t ldc;
  Rounded rounded;
  Addend<sum_t> before;
  const sum_t* bias;  // of the rows, or null
};

// How A lies: its rows or its columns are dense, or neither. With all strides in variables, the
// addresses of a tile's rows take registers that are not there.
enum class Form { kRows, kColumns, kAny };

// Pointers to a tile's rows of A, one for every few of them: these are reached by an index, and all
// of them from one pointer by more indices than there are registers.
template <int rows, int few, class T>
class RowPointers {
 public:
  RowPointers(const T* a, int64_t ld) : ld_(ld) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) first_[i] = keep_apart(a + few * i * ld);
  }
  const T* row(int i) const { return first_[i / few] + i % few * ld_; }
  void advance(int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) first_[i] = keep_apart(first_[i] + count);
  }

 private:
  static constexpr int kCount = (rows + few - 1) / few;
  // So that the compiler does not work it out from another one.
  static const T* keep_apart(const T* pointer) {
    asm("" : "+r"(pointer));
    return pointer;
  }
  const T* first_[kCount];
  int64_t ld_;
};

// `rows` rows and t.width columns of C, which are `vectors` vectors. Reads all of these in B.
template <int rows, int vectors, Form form, class T>
DLOPS_TARGET void multiply(const Tile<T>& t) {
  using O = Operand<T>;
  const int64_t lda = form == Form::kColumns ? 1 : t.lda;
  const int64_t step = form == Form::kRows ? 1 : t.step;
  using sum_t = typename O::sum_t;
  using V = Vec<sum_t>;
  V sums[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = V(sum_t(0));
  for (int64_t f = 0; f < t.count; ++f) {
    const T* b = t.factors[f].b + t.b;
    RowPointers<rows, form == Form::kColumns ? rows : 3, T> a(t.factors[f].a + t.a, lda);
    const auto add = [&](int64_t ahead) DLOPS_TARGET {
      typename O::Register row[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) row[v] = O::load(b + O::kStep * v * V::size());
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        const typename O::Register factor = O::spread(a.row(i) + ahead * step);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[i][v] = O::add(factor, row[v], sums[i][v]);
      }
      b += O::kStep * t.ldb;
    };
    int64_t term = 0;
    for (; term + O::kStep < t.terms; term += 2 * O::kStep) {
      add(0);
      add(O::kStep);
      a.advance(2 * O::kStep * step);
    }
    if (term < t.terms) add(0);
  }
  const auto finish = [&](const auto& store) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store(sums[i][v], t.c + i * t.ldc + v * V::size(), i, v);
  };
  const auto before = [&](int i, int v) { return t.before.data + i * t.before.ld + v * V::size(); };
  const int64_t tail = t.width - (vectors - 1) * V::size();
  if constexpr (O::kStep == 2) {
    if (t.rounded.data != nullptr) {
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const int64_t count = v + 1 < vectors ? V::size() : tail;
          V sum = sums[i][v];
          if (t.before.data != nullptr) sum = V::loadu(before(i, v), count) + sum;
          O::store(sum, t.rounded.data + i * t.rounded.ld + v * V::size(), count);
        }
      }
      return;
    }
  }
  if (tail < V::size() || t.bias != nullptr) {
    finish([&](V sum, sum_t* to, int i, int v) {
      const int64_t count = v + 1 < vectors ? V::size() : tail;
      if (t.before.data != nullptr) sum = V::loadu(before(i, v), count) + sum;
      if (t.bias != nullptr) sum = sum + V(t.bias[i]);
      sum.store(to, static_cast<int>(count));
    });
  } else if (t.before.data != nullptr) {
    finish(
        [&](const V& sum, sum_t* to, int i, int v) { (V::loadu(before(i, v)) + sum).store(to); });
  } else {
    finish([](const V& sum, sum_t* to, int, int) { sum.store(to); });
  }
}

template <class T>
using Multiply = void (*)(const Tile<T>&);

// multiply<rows, vectors, form>, for the sizes that there are registers for.
template <Form form, class T>
Multiply<T> multiply_of(int64_t rows, int64_t vectors) {
  static constexpr auto table = []<int... v>(std::integer_sequence<int, v...>) {
    return std::array{[]<int width, int... r>(std::integral_constant<int, width>,
                                              std::integer_sequence<int, r...>) {
      return std::array<Multiply<T>, kTallest>{&multiply<r + 1, width, form, T>...};
    }(std::integral_constant<int, v + 1>{}, std::make_integer_sequence<int, rows_of(v + 1)>{})...};
  }(std::make_integer_sequence<int, kWidest>{});
  return table[static_cast<size_t>(vectors - 1)][static_cast<size_t>(rows - 1)];
}

template <class T>
Multiply<T> multiply_of(const Tile<T>& t, int64_t rows, int64_t vectors) {
  if constexpr (Operand<T>::kStep == 1) {
    if (t.step != 1)
      return t.lda == 1 ? multiply_of<Form::kColumns, T>(rows, vectors)
                        : multiply_of<Form::kAny, T>(rows, vectors);
  }
  return multiply_of<Form::kRows, T>(rows, vectors);
}

// Rows of the only B side by side, filled up with zeros.
template <class T>
void pack(const Tile<T>& t, int64_t vectors, T* to) {
  using V = Vec<T>;
  const int64_t tail = t.width - (vectors - 1) * V::size();
  for (int64_t term = 0; term < t.terms; ++term, to += vectors * V::size()) {
    const T* from = t.factors->b + t.b + term * t.ldb;
    for (int64_t v = 0; v + 1 < vectors; ++v)
      V::loadu(from + v * V::size()).store(to + v * V::size());
    V::loadu(from + (vectors - 1) * V::size(), tail).store(to + (vectors - 1) * V::size());
  }
}

// Some of the terms of some of the factors, which are summed in registers.
template <class T>
void add_terms(int64_t m, int64_t n, int64_t k0, const Tile<T>& t, int64_t shift, T* packed) {
  constexpr int64_t L = Vec<typename Operand<T>::sum_t>::size();
  const int64_t columns = even_part((n + L - 1) / L, kWidest) * L;
  const int64_t rows = even_part(m, rows_of(static_cast<int>(columns / L)));

  for (int64_t j = 0; j < n; j += columns) {
    Tile<T> part = t;
    Factors<T> only;
    part.width = std::min(columns, n - j);
    part.b = k0 * t.ldb + j * Operand<T>::kStep;
    const int64_t vectors = (part.width + L - 1) / L;
    if constexpr (Operand<T>::kStep == 1) {
      if (packed != nullptr && part.width % L != 0) {
        pack(part, vectors, packed);
        only = {t.factors->a, packed};
        part.factors = &only;
        part.b = 0;
        part.ldb = vectors * L;
      }
    }
    for (int64_t i = 0; i < m; i += rows) {
      part.a = shift + i * t.lda + k0 * t.step;
      part.c = t.c + i * t.ldc + j;
      if (t.rounded.data != nullptr) part.rounded.data = t.rounded.data + i * t.rounded.ld + j;
      if (t.before.data != nullptr) part.before.data = t.before.data + i * t.before.ld + j;
      if (t.bias != nullptr) part.bias = t.bias + i;
      multiply_of(part, std::min(rows, m - i), vectors)(part);
    }
  }
}

// `packed`: room for a tile of B, or null where a vector may be read past a row of it.
template <class T>
void product(int64_t m, int64_t n, int64_t k, const Factors<T>* factors, int64_t count,
             const FactorStrides& strides, typename Operand<T>::sum_t* c, int64_t ldc,
             Addend<typename Operand<T>::sum_t> before, const typename Operand<T>::sum_t* bias,
             Rounded rounded, T* packed) {
  // As many factors at a time as have kTerms terms. One round at least, so that an empty sum is
  // written too.
  const int64_t together =
      packed == nullptr ? std::max<int64_t>(1, kTerms / std::max<int64_t>(1, k)) : 1;
  for (int64_t f = 0; f == 0 || f < count; f += together) {
    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kTerms) {
      const bool first = f == 0 && k0 == 0, last = f + together >= count && k0 + kTerms >= k;
      add_terms(m, n, k0,
                Tile<T>{.width = 0,
                        .terms = std::min(kTerms, k - k0),
                        .factors = factors + f,
                        .count = std::min(together, count - f),
                        .a = 0,
                        .b = 0,
                        .lda = strides.lda,
                        .step = strides.step,
                        .ldb = strides.ldb,
                        .c = c,
                        .ldc = ldc,
                        .rounded = last ? rounded : Rounded{},
                        .before = first ? before : Addend<typename Operand<T>::sum_t>{c, ldc},
                        .bias = last ? bias : nullptr},
                strides.shift, packed);
    }
  }
}

}  // namespace

template <int capability, class T>
void matmul_in_order(int64_t m, int64_t n, int64_t k, const Factors<T>* factors, int64_t count,
                     const FactorStrides& strides, T* c, int64_t ldc, Addend<T> before,
                     const T* bias) {
  alignas(64) T packed[kTerms * kWidest * Vec<T>::size()];
  const bool whole = strides.padded || n % Vec<T>::size() == 0;  // vectors of B are
  product(m, n, k, factors, count, strides, c, ldc, before, bias, Rounded{},
          whole ? nullptr : packed);
}

#if DLOPS_CAPABILITY == 2
void matmul_of_pairs(int64_t m, int64_t n, int64_t k, const Factors<c10::BFloat16>* factors,
                     int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                     Addend<float> before, Rounded rounded) {
  product<c10::BFloat16>(m, n, k, factors, count, strides, c, ldc, before, nullptr, rounded,
                         nullptr);
}
#endif

#define DLOPS_INSTANTIATE(T)                                                                       \
  template void matmul_in_order<DLOPS_CAPABILITY, T>(int64_t, int64_t, int64_t, const Factors<T>*, \
                                                     int64_t, const FactorStrides&, T*, int64_t,   \
                                                     Addend<T>, const T*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)

}  // namespace dlops::cpu
