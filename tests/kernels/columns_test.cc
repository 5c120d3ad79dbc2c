#include "kernels/columns.h"

#include <algorithm>
#include <bit>

#include "kernels/cpu/column_product.h"
#include "kernels/linear.h"
#include "kernels/panels.h"
#include "kernels/quant.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::kernels {
namespace {

constexpr DType kFormats[] = {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::BF16};

// Marks of the columns of a vector that fn chooses; the others become 0.
template <class Fn>
std::vector<std::uint32_t> mark(std::vector<float>& x, Fn&& fn) {
  std::vector<std::uint32_t> marks(x.size() / 32);
  for (std::size_t c = 0; c < x.size(); ++c) {
    if (fn(c)) {
      marks[c / 32] |= std::uint32_t{1} << (c % 32);
    } else {
      x[c] = 0;
    }
  }
  return marks;
}

/// Random weights in panels and in columns.
struct Columned {
  Columned(DType dtype, std::int64_t rows, std::int64_t cols)
      : packed(dtype, rows, cols, 1),
        view(packed.view()),
        columns(size(columns_bytes(packed.view()))),
        panels(size(panel_bytes(packed.view()))) {
    pack_columns(view, {0, cols / 32}, columns.data());
    pack_panels(view, {0, n_panels(view)}, panels.data());
    view.panels = panels.data();
  }
  Packed packed;
  WeightView view;
  AlignedBuffer<std::byte> columns, panels;
};

std::vector<float> multiply(const Columned& w, const std::vector<float>& x,
                            const std::vector<std::uint32_t>& marks, int n_parts,
                            std::int64_t& bytes) {
  AlignedBuffer<std::byte> scratch(size(column_input_bytes(w.view.cols)));
  const ColumnInput input =
      make_column_input(w.view.dtype, x.data(), marks.data(), w.view.cols, scratch.data());
  std::vector<float> y(size(w.view.rows), kNan);
  bytes = 0;
  for (int part = 0; part < n_parts; ++part) {
    bytes += multiply_columns({.columns = w.columns.data(),
                               .dtype = w.view.dtype,
                               .rows = w.view.rows,
                               .range = split(w.view.rows, n_parts, part, kColumnRows),
                               .y = y.data()},
                              input);
  }
  return y;
}

class Columns : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_columns(DType::BF16, 64, 32)) GTEST_SKIP() << "no fast path on this machine";
  }
};

TEST_F(Columns, EveryFormatAndShapeEqualsPanels) {
  Lender lender;
  lender.ctx.activations = Activations::Q16;
  for (const DType dtype : kFormats) {
    for (const std::int64_t rows : {64, 128, 192, 576}) {
      for (const std::int64_t cols : {32, 96, 512}) {
        const Columned w(dtype, rows, cols);
        for (const int every : {1, 2, 3, 7, 40, 1000}) {
          SCOPED_TRACE(testing::Message() << traits(dtype).name << " [" << rows << ", " << cols
                                          << "], every " << every);
          std::vector<float> x = normal_values(size(cols), 2);
          const auto marks = mark(x, [&](std::size_t c) {
            return c % static_cast<std::size_t>(every) == (every == 1000 ? 1u : 0u) ||
                   (every == 7 && c % 5 == 0);
          });
          std::vector<float> expected(size(rows));
          const ConstMatrix x_row(x.data(), 1, cols);
          linear(lender.ctx, w.view, x_row, Matrix(expected.data(), 1, rows), Traffic::Mlp);
          std::int64_t bytes = 0;
          const std::vector<float> y = multiply(w, x, marks, 1, bytes);
          if (dtype == DType::BF16) {
            const reference::Product product = reference::linear(w.view, x_row);
            for (std::size_t r = 0; r < y.size(); ++r) {
              ASSERT_NEAR(y[r], expected[r], 32 * kEps * product.magnitude[r]) << "row " << r;
            }
          } else {
            ASSERT_EQ(y, expected);
          }
          std::int64_t read = 0;
          const ColumnLayout layout = column_layout(dtype, rows);
          for (const std::uint32_t m : marks) {
            if (m != 0) read += layout.scale_bytes + std::popcount(m) * layout.column_bytes;
          }
          EXPECT_EQ(bytes, read);
          for (const int n_parts : {2, 3, 7}) {
            EXPECT_EQ(multiply(w, x, marks, n_parts, bytes), y);
            EXPECT_EQ(bytes, read);
          }
        }
      }
    }
  }
}

// The largest codes against the largest digits: no sum overflows, no pair saturates.
TEST_F(Columns, ExtremeCodes) {
  for (const DType dtype : {DType::Q4_0, DType::Q4_1, DType::Q8_0}) {
    for (const float sign : {1.0f, -1.0f}) {
      Columned w(dtype, 64, 32);
      std::vector<float> row(32, sign);
      row[1] = -sign;
      std::vector<std::byte> bytes(size(row_bytes(dtype, 32)) * 64);
      for (std::size_t r = 0; r < 64; ++r) {
        quantize_row(dtype, row, bytes.data() + r * size(row_bytes(dtype, 32)));
      }
      w.view.data = bytes.data();
      pack_columns(w.view, {0, 1}, w.columns.data());
      dequantize_row(dtype, bytes.data(), row);
      std::vector<float> x(32);
      double expected = 0;
      for (std::size_t i = 0; i < 32; ++i) {
        x[i] = row[i] < 0 ? -3.0f : 3.0f;
        expected += double{row[i]} * x[i];
      }
      const auto marks = mark(x, [](std::size_t) { return true; });
      std::int64_t read = 0;
      for (const float y : multiply(w, x, marks, 1, read)) {
        ASSERT_NEAR(y, expected, 1e-4 * std::fabs(expected)) << traits(dtype).name;
      }
    }
  }
}

TEST_F(Columns, NothingMarkedReadsNothing) {
  for (const DType dtype : kFormats) {
    const Columned w(dtype, 128, 64);
    std::int64_t bytes = 1;
    const std::vector<float> y =
        multiply(w, std::vector<float>(64), std::vector<std::uint32_t>(2), 1, bytes);
    EXPECT_EQ(y, std::vector<float>(128, 0.0f));
    EXPECT_EQ(bytes, 0);
  }
}

// A column that does not count is not read: its codes may be anything.
TEST_F(Columns, OtherColumnsDoNotMatter) {
  for (const DType dtype : kFormats) {
    Columned w(dtype, 192, 64);
    std::vector<float> x = normal_values(64, 2);
    const auto marks = mark(x, [](std::size_t c) { return c % 3 == 1; });
    std::int64_t bytes = 0;
    const std::vector<float> y = multiply(w, x, marks, 1, bytes);
    const ColumnLayout layout = column_layout(dtype, 192);
    for (std::size_t c = 0; c < 64; ++c) {
      if (c % 3 == 1) continue;
      const std::int64_t at = static_cast<std::int64_t>(c / 32) * layout.unit_bytes() +
                              layout.scale_bytes +
                              static_cast<std::int64_t>(c % 32) * layout.column_bytes;
      std::fill_n(w.columns.data() + at, layout.column_bytes, std::byte{0xff});  // NaN in bfloat16
    }
    EXPECT_EQ(multiply(w, x, marks, 1, bytes), y) << traits(dtype).name;
  }
}

TEST_F(Columns, ListMarkedIsAscendingAndComplete) {
  const std::vector<std::uint32_t> marks = {0x80000001u, 0, 0xffffffffu, 0x00018000u};
  std::vector<std::int32_t> ids(128 + 16), expected;
  for (std::int32_t i = 0; i < 128; ++i) {
    if (marks[size(i / 32)] >> (i % 32) & 1) expected.push_back(i);
  }
  ASSERT_EQ(list_marked(marks.data(), 128, ids.data()), std::ssize(expected));
  ids.resize(expected.size());
  EXPECT_EQ(ids, expected);
}

TEST(ColumnsLayout, HasColumns) {
  for (const DType dtype :
       {DType::F32, DType::F16, DType::Q5_0, DType::Q5_1, DType::Q4_K, DType::Q5_K, DType::Q6_K}) {
    EXPECT_FALSE(has_columns(dtype, 256, 256)) << traits(dtype).name;
  }
  EXPECT_FALSE(has_columns(DType::Q8_0, 96, 64));
  EXPECT_FALSE(has_columns(DType::Q8_0, 64, 48));
  EXPECT_FALSE(has_columns(DType::Q8_0, 64, 0));
  EXPECT_FALSE(has_columns(DType::Q8_0, 0, 64));
}

}  // namespace
}  // namespace moesaic::kernels
