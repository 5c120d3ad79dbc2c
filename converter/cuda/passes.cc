#include "converter/cuda/passes.h"

#include <algorithm>
#include <array>

#include "converter/divergence.h"
#include "converter/recovery/cuda/decoder.h"
#include "kernels/base/error.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/base/device_buffer.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/training/elementwise.h"

namespace moesaic::converter {
namespace {

const models::Checkpoint& dense(const models::Checkpoint& checkpoint) {
  for (const models::LayerWeights& layer : checkpoint.layers) {
    require<InputError>(std::holds_alternative<models::DenseMlp>(layer.mlp),
                        "{}: is a hybrid, expected a dense checkpoint",
                        checkpoint.file->path().string());
  }
  return checkpoint;
}

// What streams of one model share on the device.
struct Device {
  Device(const models::Checkpoint& checkpoint, std::int64_t n_ctx, std::int64_t rows, int gpu)
      : made_on(gpu),
        scratch(checkpoint, std::max<std::int64_t>(1, rows / n_ctx) * n_ctx, n_ctx,
                CudaWork::Forward),
        decoder(dense(checkpoint), {.finite = false}, scratch, blas, queue) {
    const models::ModelConfig& c = checkpoint.config;
    arena = DeviceParts::divide([&](DeviceParts& take) {
      take(ids, scratch.rows);
      take(kl, 1);
      take(thresholds[kInput], c.d_model);
      for (const SelfRoutedVector v : {kGate, kHidden}) take(thresholds[v], c.d_ff);
    });
  }

  cuda::MadeOn made_on;
  cuda::Stream queue;
  cuda::Blas blas{queue};
  CudaScratch scratch;
  CudaDecoder decoder;
  std::span<std::int32_t> ids;                 // [rows]
  std::span<double> kl;                        // [1]
  std::array<std::span<float>, 3> thresholds;  // by SelfRoutedVector
  cuda::PinnedBuffer<double> host_kl{1};
  std::unique_ptr<cuda::Arena> arena;
};

class CudaStream : public Stream {
 public:
  CudaStream(const Passes& passes, Device& device, std::span<const std::int32_t> tokens);

  std::int64_t n_tokens() const override { return n_tokens_; }
  void attention(int layer) override;
  void mlp_rows(int layer, const MlpRows& rows) override;
  void mlp(int layer, const models::Mlp& mlp) override;
  void add_mlp_output(int layer, Matrix y) override;
  void read(std::int64_t first, Matrix rows) override;
  void assign(const Stream& other) override;
  double divergence(const Stream& other) override;

 private:
  static const CudaStream& on_device(const Stream& stream) {
    return dynamic_cast<const CudaStream&>(stream);
  }
  Matrix r() const { return {r_.data(), n_tokens_, d_model_}; }
  // fn(first, n) for the tiles of n_rows rows.
  template <class Fn>
  void for_tiles(std::int64_t n_rows, Fn&& fn) const {
    for (std::int64_t first = 0; first < n_rows; first += d_.scratch.rows) {
      fn(first, std::min(d_.scratch.rows, n_rows - first));
    }
  }
  void copy_in(ConstMatrix host, Matrix to) const {
    check_rows(host);
    cuda::copy_bytes_in(reinterpret_cast<std::byte*>(to.data), host.data, bytes_of(host), d_.queue);
  }
  void copy_out(ConstMatrix from, Matrix host) const {
    check_rows(host);
    cuda::copy_bytes_out(host.data, reinterpret_cast<const std::byte*>(from.data), bytes_of(from),
                         d_.queue);
  }
  static void check_rows(ConstMatrix host) {
    require<ShapeError>(host.stride == host.cols,
                        "calibration: rows of {}, {} apart, expected no gaps", host.cols,
                        host.stride);
  }
  static std::size_t bytes_of(ConstMatrix m) {
    return static_cast<std::size_t>(m.rows * m.cols) * sizeof(float);
  }
  Matrix spread(std::int64_t first, std::int64_t n, std::int64_t n_rows) const;
  bool of_own_matrices(std::size_t layer, const models::Mlp& mlp) const;
  CudaMlp put_thresholds(std::size_t layer, const kernels::SelfRoutedView& routed) const;
  void mlp_on_host(std::size_t layer, const models::Mlp& mlp) const;

  const Passes& passes_;
  Device& d_;
  std::int64_t n_tokens_, d_model_;
  cuda::DeviceBuffer<float> r_;  // [n_tokens, d_model]
};

CudaStream::CudaStream(const Passes& passes, Device& device, std::span<const std::int32_t> tokens)
    : passes_(passes),
      d_(device),
      n_tokens_(std::ssize(tokens)),
      d_model_(device.decoder.config().d_model),
      r_(static_cast<std::size_t>(n_tokens_ * d_model_)) {
  for_tiles(n_tokens_, [&](std::int64_t first, std::int64_t n) {
    const auto part = tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    const auto ids = d_.ids.first(part.size());
    converter::copy_in(part, ids, d_.queue);
    d_.decoder.embed(ids, r().slice(first, n));
  });
  d_.queue.synchronize();
}

void CudaStream::attention(int layer) {
  for_tiles(n_tokens_, [&](std::int64_t first, std::int64_t n) {
    d_.decoder.attention(static_cast<std::size_t>(layer), d_.scratch.tape, r().slice(first, n));
  });
}

// Rows [first, first + n) of n_rows that are spread over the stream: its own, or in the scratch.
Matrix CudaStream::spread(std::int64_t first, std::int64_t n, std::int64_t n_rows) const {
  if (n_rows == n_tokens_) return r().slice(first, n);
  std::vector<std::int32_t> places;
  for (std::int64_t i = first; i < first + n; ++i) {
    places.push_back(static_cast<std::int32_t>(i * n_tokens_ / n_rows));
  }
  converter::copy_in<std::int32_t>(places, d_.ids.first(places.size()), d_.queue);
  d_.queue.synchronize();
  // Rows of a table, as embeddings are.
  const WeightView table{reinterpret_cast<const std::byte*>(r_.data()), DType::F32, n_tokens_,
                         d_model_};
  const Matrix rows = view(d_.scratch.r, n, d_model_);
  cuda::embed(table, d_.ids.data(), 1, rows, d_.queue);
  return rows;
}

void CudaStream::mlp_rows(int layer, const MlpRows& rows) {
  const auto l = static_cast<std::size_t>(layer);
  for_tiles(rows.x.rows, [&](std::int64_t first, std::int64_t n) {
    const Matrix from = spread(first, n, rows.x.rows);
    const Matrix x = view(d_.scratch.x, n, d_model_), y = view(d_.scratch.y, n, d_model_);
    if (rows.r.rows > 0) copy_out(from, rows.r.slice(first, n));
    d_.decoder.mlp_input(l, from, x);
    copy_out(x, rows.x.slice(first, n));
    if (rows.y.rows == 0) return;
    d_.decoder.mlp_output(d_.decoder.dense_mlp(l), d_.scratch.tape, x, false, y);
    copy_out(y, rows.y.slice(first, n));
  });
  d_.queue.synchronize();
}

// Whether the products are those of the checkpoint's layer, which are on the device.
bool CudaStream::of_own_matrices(std::size_t layer, const models::Mlp& mlp) const {
  const auto& own = std::get<models::DenseMlp>(passes_.own_mlp(static_cast<int>(layer)));
  const auto same = [&](const auto& other) {
    return other.w_gate.data == own.w_gate.data && other.w_up.data == own.w_up.data &&
           other.w_down.data == own.w_down.data;
  };
  if (const auto* m = std::get_if<models::DenseMlp>(&mlp)) return same(*m);
  if (const auto* m = std::get_if<kernels::SelfRoutedView>(&mlp)) return same(*m);
  return false;
}

CudaMlp CudaStream::put_thresholds(std::size_t layer, const kernels::SelfRoutedView& routed) const {
  CudaMlp mlp = d_.decoder.dense_mlp(layer);
  mlp.phi = routed.phi;
  mlp.self_routed = true;
  mlp.up_by_input = routed.up_by_input;
  const auto put = [&](SelfRoutedVector which, std::span<const float> values) {
    if (values.empty()) return;
    converter::copy_in(values, d_.thresholds[which].first(values.size()), d_.queue);
    mlp.threshold[which] = {d_.thresholds[which].data(), 1};
  };
  put(kInput, routed.input_threshold);
  put(kGate, routed.gate_threshold);
  put(kHidden, routed.hidden_threshold);
  d_.queue.synchronize();  // they are the caller's
  return mlp;
}

void CudaStream::mlp_on_host(std::size_t layer, const models::Mlp& mlp) const {
  Context& ctx = passes_.model().context();
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t most = std::min(d_.scratch.rows, n_tokens_);
  const auto take = [&] {
    return Matrix(ctx.workspace.take<float>(static_cast<std::size_t>(most * d_model_)).data(), most,
                  d_model_);
  };
  const Matrix x = take(), y = take();
  for_tiles(n_tokens_, [&](std::int64_t first, std::int64_t n) {
    const Matrix rows = r().slice(first, n);
    const Matrix on_device = view(d_.scratch.y, n, d_model_);
    d_.decoder.mlp_input(layer, rows, on_device);
    copy_out(on_device, x.slice(0, n));
    d_.queue.synchronize();
    models::mlp_forward(ctx, mlp, {.x = x.slice(0, n)}, y.slice(0, n));
    copy_in(y.slice(0, n), on_device);
    d_.decoder.add_mlp_output(layer, on_device, rows);
  });
  d_.queue.synchronize();
}

void CudaStream::mlp(int layer, const models::Mlp& mlp) {
  const auto l = static_cast<std::size_t>(layer);
  if (!of_own_matrices(l, mlp)) {
    mlp_on_host(l, mlp);
    return;
  }
  const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp);
  const CudaMlp own = routed == nullptr ? d_.decoder.dense_mlp(l) : put_thresholds(l, *routed);
  for_tiles(n_tokens_, [&](std::int64_t first, std::int64_t n) {
    d_.decoder.mlp(l, own, d_.scratch.tape, r().slice(first, n));
  });
}

void CudaStream::add_mlp_output(int layer, Matrix y) {
  for_tiles(n_tokens_, [&](std::int64_t first, std::int64_t n) {
    const Matrix on_device = view(d_.scratch.y, n, d_model_);
    copy_in(y.slice(first, n), on_device);
    d_.decoder.add_mlp_output(static_cast<std::size_t>(layer), on_device, r().slice(first, n));
  });
  d_.queue.synchronize();
}

void CudaStream::read(std::int64_t first, Matrix rows) {
  copy_out(r().slice(first, rows.rows), rows);
  d_.queue.synchronize();
}

void CudaStream::assign(const Stream& other) {
  require<ShapeError>(other.n_tokens() == n_tokens_,
                      "calibration: a stream of {} tokens for one of {}", other.n_tokens(),
                      n_tokens_);
  cuda::copy(on_device(other).r_.data(), n_tokens_ * d_model_, r_.data(), d_.queue);
}

double CudaStream::divergence(const Stream& other) {
  const std::int64_t n_judged = n_tokens_ / kJudgedStep;
  // Rows kJudgedStep − 1, 2 kJudgedStep − 1, …
  const auto judged = [&](const CudaStream& stream, std::int64_t first, std::int64_t n) {
    const std::int64_t row = (first + 1) * kJudgedStep - 1;
    return Matrix(stream.r().row(row), n, d_model_, kJudgedStep * d_model_);
  };
  zero(d_.kl, d_.queue);
  for_tiles(n_judged, [&](std::int64_t first, std::int64_t n) {
    std::uint16_t *p = d_.scratch.operand.data(), *q = d_.scratch.hidden.data();
    d_.decoder.hidden(judged(*this, first, n), p);
    d_.decoder.hidden(judged(on_device(other), first, n), q);
    d_.decoder.divergence({p, n, d_model_}, {q, n, d_model_}, 1, {}, d_.kl.data());
  });
  converter::copy_out<double>(d_.kl, d_.host_kl.span(), d_.queue);
  d_.queue.synchronize();
  return checked_divergence(
      passes_.model(),
      d_.host_kl.span()[0] / static_cast<double>(std::max<std::int64_t>(1, n_judged)));
}

class CudaPasses : public Passes {
 public:
  CudaPasses(models::Transformer& model, std::int64_t n_ctx, std::int64_t rows, int device)
      : Passes(model), device_(model.checkpoint(), n_ctx, rows, device) {}

  std::unique_ptr<Stream> stream(std::span<const std::int32_t> tokens,
                                 std::int64_t n_ctx) override {
    require<ShapeError>(n_ctx == device_.scratch.n_ctx && std::ssize(tokens) % n_ctx == 0,
                        "calibration: {} tokens in windows of {} on CUDA, expected whole windows "
                        "of {}",
                        tokens.size(), n_ctx, device_.scratch.n_ctx);
    return std::make_unique<CudaStream>(*this, device_, tokens);
  }

 private:
  Device device_;
};

}  // namespace

MakeDevicePasses cuda_passes(int device, std::int64_t rows) {
  return [device, rows](models::Transformer& model, std::int64_t n_ctx) {
    return std::make_unique<CudaPasses>(model, n_ctx, rows, device);
  };
}

}  // namespace moesaic::converter
