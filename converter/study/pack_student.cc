#include "converter/study/pack_student.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/quant.h"

namespace moesaic::converter::study {
namespace {

AlignedBuffer<std::byte> pack_rows(std::span<const float> values, std::int64_t cols, DType dtype) {
  const auto n = static_cast<std::size_t>(cols);
  const std::size_t rows = n == 0 ? 0 : values.size() / n;
  const auto bytes = static_cast<std::size_t>(row_bytes(dtype, cols));
  AlignedBuffer<std::byte> packed(rows * bytes);
  for (std::size_t r = 0; r < rows; ++r) {
    kernels::quantize_row(dtype, values.subspan(r * n, n), packed.data() + r * bytes);
  }
  return packed;
}

AlignedBuffer<float> scaled(std::span<const float> values, double factor = 1) {
  AlignedBuffer<float> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(),
                 [&](float v) { return static_cast<float>(v * factor); });
  return out;
}

// In and out rows of each neuron one behind the other.
AlignedBuffer<std::byte> pack_neurons(const AlignedBuffer<float>& in,
                                      const AlignedBuffer<float>& out, double y_scale,
                                      std::int64_t d_model, DType dtype) {
  const AlignedBuffer<float> scaled_out = scaled(out.span(), y_scale);
  AlignedBuffer<float> rows(2 * in.size());
  const auto d = static_cast<std::size_t>(d_model);
  for (std::size_t first = 0; first < in.size(); first += d) {
    std::copy_n(in.data() + first, d, rows.data() + 2 * first);
    std::copy_n(scaled_out.data() + first, d, rows.data() + 2 * first + d);
  }
  return pack_rows(rows.span(), d_model, dtype);
}

}  // namespace

models::PackedMixture pack(const PaperStudent& s, double y_scale, DType expert_dtype,
                           DType router_dtype) {
  require<ShapeError>(s.shape.n_experts > 0, "a {} student has no experts to write",
                      family_name(s.shape.family));
  const std::int64_t d = s.shape.d_model;
  models::PackedMixture out;
  out.kind = mixture_kind(s.shape.family);
  out.n_active = s.shape.n_active;
  out.d_model = d;
  out.n_shared = s.shape.n_shared;
  out.n_experts = s.shape.n_experts;
  out.router_rank = s.router_cols();
  out.expert_dtype = expert_dtype;
  out.router_dtype = router_dtype;
  out.shared = pack_neurons(s.shared_in, s.shared_out, y_scale, d, expert_dtype);
  out.experts = pack_neurons(s.expert_in, s.expert_out, y_scale, d, expert_dtype);
  out.shared_bias = scaled(s.shared_bias.span());
  out.expert_bias = scaled(s.expert_bias.span());
  out.router_v = pack_rows(s.router_v.span(), d, router_dtype);
  out.router_u = pack_rows(s.router_u.span(), out.router_rank, router_dtype);
  out.router_bias = scaled(s.router_bias.span());
  out.bias = scaled(s.bias.span(), y_scale);
  return out;
}

}  // namespace moesaic::converter::study
