// What lies between the products of experts under training, against obvious loops in double.

#include "kernels/cuda/training/experts.h"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

#include "converter/recovery/arithmetic.h"
#include "kernels/base/error.h"
#include "kernels/cuda/training/gated_mlp.h"
#include "kernels/quant.h"
#include "tests/converter/cuda/on_arrays.h"
#include "tests/kernels/support.h"

namespace moesaic::converter {
namespace {

class CudaExperts : public OnArrays {};

TEST_F(CudaExperts, ChoiceIsTheHosts) {
  for (const std::int64_t n : {1, 31, 300}) {
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, n / 2, n}) {
      const std::int64_t rows = 4;
      auto scores = normal_values(size(rows * n), 1);
      const auto bias = normal_values(size(n), 2);
      std::fill_n(scores.begin(), n, 0.0F);
      for (std::int64_t i = 0; i < n; ++i) scores[size(i)] = -bias[size(i)];  // all equal
      if (n > 2) scores[size(n + 2)] = kNan, scores[size(n)] = kInf;
      const auto d_scores = put(scores), d_bias = put(bias);
      const cuda::DeviceBuffer<std::int32_t> ids(size(rows * k));
      const cuda::DeviceBuffer<std::uint8_t> mask(scores.size());
      cuda::choose_experts(d_bias.data(), k, all(d_scores, rows, n), ids.data(), mask.data(),
                           stream);
      const auto found = get(mask);
      const auto sums = get(d_scores);
      for (std::int64_t t = 0; t < rows; ++t) {
        float* row = scores.data() + t * n;
        for (std::int64_t i = 0; i < n; ++i) row[i] += bias[size(i)];
        std::vector<std::int32_t> chosen(size(k));
        choose_top(row, n, k, chosen.data());
        std::vector<std::uint8_t> expected(size(n));
        for (const std::int32_t e : chosen) expected[size(e)] = 1;
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), found.begin() + t * n)) << t;
        for (std::int64_t i = 0; i < n; ++i) {
          EXPECT_TRUE(std::isnan(row[i]) || sums[size(t * n + i)] == row[i]);
        }
      }
    }
  }
  const cuda::DeviceBuffer<float> two(2);
  EXPECT_THROW(cuda::choose_experts(two.data(), 3, all(two, 1, 2), nullptr, nullptr, stream),
               ShapeError);
}

TEST_F(CudaExperts, NormsOfRows) {
  for (const std::int64_t d : {1, 31, 64, 577}) {
    const std::int64_t rows = 9;
    const auto w = normal_values(size(rows * d), 1);
    const auto d_w = put(w);
    const cuda::DeviceBuffer<float> norm(size(rows));
    cuda::row_norms(all(d_w, rows, d), norm.data(), stream);
    const auto found = get(norm);
    for (std::int64_t i = 0; i < rows; ++i) {
      double square = 0;
      for (std::int64_t j = 0; j < d; ++j) square += std::pow(w[size(i * d + j)], 2.0);
      EXPECT_NEAR(found[size(i)], std::sqrt(square), static_cast<double>(d) * kEps * 10);
    }
  }
}

struct NeuronCase {
  std::int64_t n_shared, n_experts, block, n_families = 0;
};

// Both forms against the formulas in double; in float32 the slopes stand where the products do.
TEST_F(CudaExperts, SlopesAreTheFormulas) {
  for (const NeuronCase& c : {NeuronCase{0, 1, 1}, NeuronCase{5, 300, 1}, NeuronCase{3, 17, 4},
                              NeuronCase{0, 40, 1, 7}, NeuronCase{2, 12, 3, 4}}) {
    for (const kernels::Activation phi :
         {kernels::Activation::Silu, kernels::Activation::GeluTanh}) {
      const std::int64_t rows = 3, n = c.n_shared + c.n_experts * c.block;
      auto gate = normal_values(size(rows * n), 1, 2), up = normal_values(size(rows * n), 2);
      const auto scores = normal_values(size(rows * c.n_experts), 3);
      auto mean = normal_values(size(n), 4, 0.2F), norm = normal_values(size(n), 5);
      for (float& v : norm) v = std::abs(v);
      std::vector<std::uint8_t> mask(scores.size());
      for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 0;
      // Family j: experts j and j + n_families, and one more of the first.
      std::vector<std::int32_t> family(c.n_families > 0 ? size(c.n_experts) : 0, -1), begin,
          members;
      for (std::int64_t j = 0; j < c.n_families; ++j) {
        begin.push_back(static_cast<std::int32_t>(members.size()));
        for (std::int64_t e = j; e < (j == 0 ? 3 : 2) * c.n_families; e += c.n_families) {
          members.push_back(static_cast<std::int32_t>(e));
          family[size(e)] = static_cast<std::int32_t>(j);
        }
      }
      begin.push_back(static_cast<std::int32_t>(members.size()));
      const auto d_gate = put(gate), d_up = put(up), d_scores = put(scores), d_mean = put(mean),
                 d_norm = put(norm);
      const auto d_mask = put(mask);
      const auto d_family = put(family), d_begin = put(begin), d_members = put(members);
      const cuda::ExpertNeurons neurons{.phi = phi,
                                        .n_shared = c.n_shared,
                                        .block = c.block,
                                        .mean = d_mean.data(),
                                        .norm = d_norm.data(),
                                        .family = c.n_families > 0 ? d_family.data() : nullptr,
                                        .begin = d_begin.data(),
                                        .members = d_members.data()};
      const cuda::DeviceBuffer<float> f(gate.size()), gap(scores.size());
      const cuda::DeviceBuffer<double> squared(size(rows)), squared_bits(size(rows));
      const cuda::DeviceBuffer<std::uint16_t> f_bits(gate.size()), gate_bits(gate.size()),
          up_bits(gate.size()), gap_bits(scores.size()), centred(scores.size());
      cuda::expert_slopes(neurons, all(d_gate, rows, n), all(d_up, rows, n),
                          all(d_scores, rows, c.n_experts), d_mask.data(),
                          cuda::ExpertTape<std::uint16_t>{
                              f_bits.data(), gate_bits.data(), up_bits.data(), gap_bits.data(),
                              c.block == 1 ? centred.data() : nullptr, squared_bits.data()},
                          stream);
      cuda::expert_slopes(neurons, all(d_gate, rows, n), all(d_up, rows, n),
                          all(d_scores, rows, c.n_experts), d_mask.data(),
                          cuda::ExpertTape<float>{.f = f.data(),
                                                  .slope_gate = d_gate.data(),
                                                  .slope_up = d_up.data(),
                                                  .gap = gap.data(),
                                                  .squared_gap = squared.data()},
                          stream);
      const auto found_f = get(f), found_gate = get(d_gate), found_up = get(d_up),
                 found_gap = get(gap);
      const auto found_squared = get(squared);
      const auto near = [&](double found, double expected, double scale) {
        EXPECT_NEAR(found, expected, 40 * kEps * (scale + std::fabs(expected)));
      };
      for (std::int64_t t = 0; t < rows; ++t) {
        double expected_squared = 0;
        for (std::int64_t i = 0; i < n; ++i) {
          const std::size_t at = size(t * n + i);
          double value = 0, slope = 0;
          const double g = gate[at], u = up[at];
          activation_slope(phi, &g, 1, &value, &slope);
          const std::int64_t e = i < c.n_shared ? -1 : (i - c.n_shared) / c.block;
          const double on = e < 0 || mask[size(t * c.n_experts + e)] ? 1 : 0;
          near(found_f[at], on * (value * u - (e < 0 ? 0 : mean[size(i)])), 1);
          near(found_gate[at], on * slope * u, 1);
          near(found_up[at], on * value, 1);
        }
        for (std::int64_t e = 0; e < c.n_experts; ++e) {
          const std::size_t at = size(t * c.n_experts + e);
          double square = 0;
          for (std::int64_t i = c.n_shared + e * c.block; i < c.n_shared + (e + 1) * c.block; ++i) {
            double value = 0, slope = 0;
            const double g = gate[size(t * n + i)];
            activation_slope(phi, &g, 1, &value, &slope);
            square += std::pow((value * up[size(t * n + i)] - mean[size(i)]) * norm[size(i)], 2);
          }
          bool wins = true;
          if (c.n_families > 0 && family[size(e)] >= 0) {
            for (std::int64_t other = family[size(e)]; other < c.n_experts; ++other) {
              if (family[size(other)] != family[size(e)]) continue;
              wins = wins && scores[size(t * c.n_experts + other)] <= scores[at];
            }
          }
          const double expected = scores[at] - (wins ? std::sqrt(square) : 0);
          near(found_gap[at], expected, 10);
          expected_squared += expected * expected;
        }
        EXPECT_NEAR(found_squared[size(t)], expected_squared, 1e-5 * (1 + expected_squared));
      }
      // The other form rounds the same values.
      EXPECT_EQ(get(f_bits), rounded(found_f));
      EXPECT_EQ(get(gate_bits), rounded(found_gate));
      EXPECT_EQ(get(up_bits), rounded(found_up));
      EXPECT_EQ(get(gap_bits), rounded(found_gap));
      EXPECT_EQ(get(squared_bits), found_squared);
      if (c.block > 1) continue;
      const auto found_centred = get(centred);
      for (std::size_t i = 0; i < mask.size(); ++i) {
        const std::size_t at =
            i / size(c.n_experts) * size(n) + size(c.n_shared) + i % size(c.n_experts);
        EXPECT_TRUE(!mask[i] || found_centred[i] == rounded({found_f[at]})[0]);
      }
    }
  }
}

// Equal scores of a family: its first member answers.
TEST_F(CudaExperts, TiesOfAFamilyGoToItsFirst) {
  const auto gate = put(std::vector<float>{1, 1, 1}), up = put(std::vector<float>{1, 1, 1});
  const auto scores = put(std::vector<float>{2, 2, 2}), mean = put(std::vector<float>(3)),
             norm = put(std::vector<float>{1, 1, 1});
  const auto mask = put(std::vector<std::uint8_t>{1, 1, 1});
  const auto family = put(std::vector<std::int32_t>{0, 0, 0}),
             begin = put(std::vector<std::int32_t>{0, 3}),
             members = put(std::vector<std::int32_t>{0, 1, 2});
  const cuda::DeviceBuffer<float> f(3), gap(3);
  const cuda::DeviceBuffer<double> squared(1);
  cuda::expert_slopes({kernels::Activation::Silu, 0, 1, mean.data(), norm.data(), family.data(),
                       begin.data(), members.data()},
                      all(gate, 1, 3), all(up, 1, 3), all(scores, 1, 3), mask.data(),
                      cuda::ExpertTape<float>{.f = f.data(),
                                              .slope_gate = gate.data(),
                                              .slope_up = up.data(),
                                              .gap = gap.data(),
                                              .squared_gap = squared.data()},
                      stream);
  const auto found = get(gap);
  EXPECT_LT(found[0], 2);
  EXPECT_EQ(found[1], 2);
  EXPECT_EQ(found[2], 2);
}

TEST_F(CudaExperts, GatesAndGradientsOfScores) {
  // Even: the stand-in takes two halves of a word, of two blocks, for one (docs/cudasim.md).
  for (const std::int64_t n : {2, 34, 500}) {
    const std::int64_t rows = 3, k = std::max<std::int64_t>(1, n / 4), stride = n + 5;
    auto scores = normal_values(size(rows * n), 1);
    const auto bias = std::vector<float>(size(n));
    std::fill_n(scores.begin() + 2 * n, n, 0.5F);  // no spread: the narrowest gate, on a tie
    const auto d_scores = put(scores), d_bias = put(bias);
    const cuda::DeviceBuffer<std::int32_t> ids(size(rows * k));
    const cuda::DeviceBuffer<std::uint8_t> mask(scores.size());
    const cuda::DeviceBuffer<std::uint16_t> kappa(scores.size());
    cuda::choose_experts(d_bias.data(), k, all(d_scores, rows, n), ids.data(), mask.data(), stream);
    const float width = 0.7F;
    cuda::gate_slopes(all(d_scores, rows, n), mask.data(), width, kappa.data(), stream);
    const auto found_kappa = get(kappa);
    for (std::int64_t t = 0; t < 2; ++t) {
      std::vector<double> row(scores.begin() + t * n, scores.begin() + (t + 1) * n);
      double sum = 0, square = 0;
      for (const double s : row) sum += s, square += s * s;
      auto sorted = row;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      const double theta = (sorted[size(k - 1)] + sorted[size(k)]) / 2;
      const double mean = sum / static_cast<double>(n);
      const double w = width * std::sqrt(square / static_cast<double>(n) - mean * mean);
      for (std::int64_t i = 0; i < n; ++i) {
        const double expected = std::max(0.0, 1 - std::abs(row[size(i)] - theta) / w) / w;
        EXPECT_NEAR(value_of(found_kappa[size(t * n + i)]), expected,
                    kBf16Eps * expected + 1e-4 / w);
      }
    }
    EXPECT_EQ(value_of(found_kappa[size(2 * n)]), value_of(rounded({1e20F})[0]));

    // Gradients, with the gates of the first two rows.
    const auto gap = normal_values(size(rows * n), 2), df = normal_values(size(rows * stride), 3);
    const auto weight = normal_values(size(rows), 4);
    auto gates = normal_values(size(rows * n), 6);
    for (float& v : gates) v = std::max(0.0F, v);
    std::fill_n(gates.begin() + 2 * n, n, 0.0F);
    const Bits kappa_bits = rounded(gates), centred = rounded(normal_values(size(rows * n), 5));
    const auto d_weight = put(weight), d_df = put(df), plain = put(gap);
    const auto d_kappa = put(kappa_bits), d_centred = put(centred), bits = put(rounded(gap)),
               gated = put(rounded(gap));
    const double unit = 0.37;
    cuda::score_gradients(d_weight.data(), unit, all(plain, rows, n), stream);
    cuda::score_gradients(d_weight.data(), unit, {}, all(bits, rows, n), stream);
    cuda::score_gradients(d_weight.data(), unit,
                          {0.8F, d_df.data(), stride, d_centred.data(), d_kappa.data()},
                          all(gated, rows, n), stream);
    const auto found_plain = get(plain);
    const auto found_bits = get(bits), found_gated = get(gated);
    for (std::int64_t t = 0; t < rows; ++t) {
      double total = 0, mean = 0;
      const auto effect = [&](std::int64_t i) {
        return df[size(t * stride + i)] * value_of(centred[size(t * n + i)]);
      };
      for (std::int64_t i = 0; i < n; ++i) {
        total += value_of(kappa_bits[size(t * n + i)]);
        mean += value_of(kappa_bits[size(t * n + i)]) * effect(i);
      }
      if (total > 0) mean /= total;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::size_t at = size(t * n + i);
        const double factor = unit * weight[size(t)];
        EXPECT_NEAR(found_plain[at], factor * gap[at], 4 * kEps * std::fabs(factor * gap[at]));
        const double own = factor * value_of(rounded(gap)[at]);
        EXPECT_NEAR(value_of(found_bits[at]), own, kBf16Eps * std::fabs(own));
        const double share = 0.8 * value_of(kappa_bits[at]) * (effect(i) - mean);
        EXPECT_NEAR(value_of(found_gated[at]), own + share,
                    kBf16Eps * std::fabs(own + share) +
                        100 * kEps * (std::fabs(share) + std::fabs(mean) + std::fabs(own)));
      }
    }
  }
}

TEST_F(CudaExperts, OutputsBecomeGradients) {
  for (const std::int64_t d : {1, 31, 300}) {
    const std::int64_t rows = 5;
    const auto y = normal_values(size(rows * d), 1), given = normal_values(size(rows * d), 2),
               bias = normal_values(size(d), 3);
    std::vector<float> weight = {0, 1, 2, 0.5F, 3};
    const auto d_y = put(y), d_given = put(given), d_bias = put(bias), d_weight = put(weight);
    const cuda::DeviceBuffer<double> squared(size(rows));
    const double unit = 0.3;
    cuda::output_gradients(d_bias.data(), all(d_y, rows, d), d_weight.data(), unit,
                           all(d_given, rows, d), squared.data(), stream);
    const auto total = put(std::vector<double>{1});
    cuda::add_weighted(squared.data(), d_weight.data(), rows, unit, total.data(), stream);
    const auto slopes = get(d_given);
    const auto squares = get(squared);
    double expected_total = 1;
    for (std::int64_t t = 0; t < rows; ++t) {
      double square = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        const std::size_t at = size(t * d + j);
        const double gap = static_cast<double>(given[at]) + bias[size(j)] - y[at];
        square += gap * gap;
        EXPECT_NEAR(slopes[at], unit * weight[size(t)] * gap, 20 * kEps);
      }
      EXPECT_NEAR(squares[size(t)], square, 10 * kEps * square + 10 * kEps);
      expected_total += unit * weight[size(t)] * square;
    }
    EXPECT_NEAR(get(total)[0], expected_total, 1e-5 * expected_total);
  }
}

TEST_F(CudaExperts, RowsAreAddedUpAndGathered) {
  for (const std::int64_t d : {1, 32, 577}) {
    for (const std::int64_t rows : {0, 1, 7, 100}) {
      const auto m = normal_values(size(rows * d), 1);
      const auto d_m = put(m);
      const auto bits = put(rounded(m));
      const auto sums = put(std::vector<float>(size(d), 1)),
                 of_bits = put(std::vector<float>(size(d)));
      cuda::add_rows(all(d_m, rows, d), sums.data(), stream);
      cuda::add_rows(MatrixView<const std::uint16_t>(bits.data(), rows, d), of_bits.data(), stream);
      const auto found = get(sums), found_of_bits = get(of_bits);
      for (std::int64_t j = 0; j < d; ++j) {
        double expected = 1, expected_of_bits = 0, norm = 1;
        for (std::int64_t t = 0; t < rows; ++t) {
          const std::size_t at = size(t * d + j);
          expected += m[at];
          expected_of_bits += value_of(rounded({m[at]})[0]);
          norm += std::fabs(m[at]);
        }
        EXPECT_NEAR(found[size(j)], expected, 20 * kEps * norm);
        EXPECT_NEAR(found_of_bits[size(j)], expected_of_bits, 20 * kEps * norm);
      }
      const auto bias = normal_values(size(d), 2);
      const auto d_bias = put(bias), moved = put(m);
      cuda::add_bias(d_bias.data(), all(moved, rows, d), stream);
      const auto found_moved = get(moved);
      for (std::size_t i = 0; i < m.size(); ++i) {
        EXPECT_EQ(found_moved[i], m[i] + bias[i % size(d)]);
      }
      if (rows == 0) continue;
      std::vector<std::int32_t> ids;
      for (int i = 0; i < 9; ++i) ids.push_back(static_cast<std::int32_t>(i * 5 % rows));
      const auto d_ids = put(ids);
      const cuda::DeviceBuffer<float> taken(size(9 * d));
      cuda::gather_rows(all(d_m, rows, d), d_ids.data(), all(taken, 9, d), stream);
      const auto found_rows = get(taken);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        EXPECT_TRUE(std::equal(m.begin() + ids[i] * d, m.begin() + (ids[i] + 1) * d,
                               found_rows.begin() + static_cast<std::ptrdiff_t>(i) * d));
      }
    }
  }
}

TEST_F(CudaExperts, WeightsOfTokensHaveMeanOne) {
  for (const std::int64_t rows : {1, 9, 300}) {
    const std::int64_t d = 33;
    auto r = normal_values(size(rows * d), 1);
    const auto y = normal_values(size(rows * d), 2);
    std::fill_n(r.begin(), d, 0.01F);  // counts for the most
    const auto d_r = put(r), d_y = put(y);
    const cuda::DeviceBuffer<float> plain(size(rows)), behind_norm(size(rows));
    cuda::token_weights(all(d_r, rows, d), {}, plain.data(), stream);
    cuda::token_weights(all(d_r, rows, d), all(d_y, rows, d), behind_norm.data(), stream);
    std::vector<double> expected(size(rows)), behind(size(rows));
    const auto square = [&](const std::vector<float>& m, std::size_t t) {
      double sum = 1e-20;
      for (std::size_t j = 0; j < size(d); ++j) sum += std::pow(m[t * size(d) + j], 2.0);
      return sum;
    };
    for (std::size_t t = 0; t < size(rows); ++t) {
      expected[t] = 1 / square(r, t);
      behind[t] = expected[t] * static_cast<double>(d) / square(y, t);
    }
    for (auto* w : {&expected, &behind}) {
      const double total = std::accumulate(w->begin(), w->end(), 0.0);
      for (double& v : *w) v *= static_cast<double>(rows) / total;
    }
    const auto a = get(plain), b = get(behind_norm);
    for (std::size_t t = 0; t < size(rows); ++t) {
      EXPECT_NEAR(a[t], expected[t], 100 * kEps * expected[t]);
      EXPECT_NEAR(b[t], behind[t], 100 * kEps * behind[t]);
    }
  }
}

TEST_F(CudaExperts, Float32SlopesAreScaled) {
  const std::size_t n = 1000;
  const auto gate = normal_values(n, 1), up = normal_values(n, 2), dh = normal_values(n, 3);
  const auto d_gate = put(gate), d_up = put(up), d_dh = put(dh);
  cuda::scale_slopes(d_dh.data(), static_cast<std::int64_t>(n), d_gate.data(), d_up.data(), stream);
  const auto g = get(d_gate), u = get(d_up);
  for (std::size_t i = 0; i < n; ++i) {
    EXPECT_EQ(g[i], gate[i] * dh[i]);
    EXPECT_EQ(u[i], up[i] * dh[i]);
  }
}

}  // namespace
}  // namespace moesaic::converter
