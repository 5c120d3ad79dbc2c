#include "models/secret_moe_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "tests/models/expect_same.h"
#include "tests/models/gguf_bytes.h"

namespace moesaic::models {
namespace {

using testing::contains;
using testing::ends_with;
using testing::error_of;
using testing::TempFolder;

constexpr std::int64_t kModel = 64, kShared = 3, kExperts = 5, kRank = 32, kBypass = 32;

AlignedBuffer<std::byte> some_bytes(DType dtype, std::int64_t rows, std::int64_t cols) {
  AlignedBuffer<std::byte> b(static_cast<std::size_t>(rows * row_bytes(dtype, cols)));
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<std::byte>(i * 31 + 5);
  return b;
}

AlignedBuffer<float> some_floats(std::int64_t n, float first) {
  AlignedBuffer<float> b(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = first + static_cast<float>(i);
  return b;
}

PackedSecretMoe packed_layer(std::int64_t n_shared = kShared, std::int64_t bypass_rank = kBypass) {
  PackedSecretMoe p;
  p.phi = kernels::Activation::GeluTanh;
  p.n_active = 2;
  p.d_model = kModel;
  p.n_shared = n_shared;
  p.n_experts = kExperts;
  p.router_rank = kRank;
  p.bypass_rank = bypass_rank;
  p.expert_dtype = DType::Q4_1;
  p.router_dtype = DType::Q8_0;
  p.shared = some_bytes(p.expert_dtype, 3 * n_shared, kModel);
  p.experts = some_bytes(p.expert_dtype, 3 * kExperts, kModel);
  p.router_v = some_bytes(p.router_dtype, kRank, kModel);
  p.router_u = some_bytes(p.router_dtype, kExperts, kRank);
  p.bypass_q = some_bytes(p.router_dtype, bypass_rank, kModel);
  p.bypass_p = some_bytes(p.router_dtype, kModel, bypass_rank);
  p.expert_mean = some_floats(kExperts, 10);
  p.router_bias = some_floats(kExperts, 20);
  p.bias = some_floats(kModel, 30);
  return p;
}

/// What the converter writes around a layer: layer 0 dense, layer 1 converted.
GgufWriter hybrid_writer() {
  GgufWriter w;
  w.set(std::string(kKeyFormatVersion), GgufValue::u32(kSecretMoeFormatVersion));
  w.set(std::string(kKeyLayerKind), GgufValue::string_array({"dense", "glu+low_rank"}));
  w.set(std::string(kKeyLayerActive), GgufValue::u32_array({0, 2}));
  return w;
}

using models::expect_same;

void expect_same(const kernels::SecretMoeView& a, const kernels::SecretMoeView& b) {
  EXPECT_EQ(a.phi, b.phi);
  EXPECT_EQ(a.n_active, b.n_active);
  expect_same(a.shared, b.shared);
  expect_same(a.experts, b.experts);
  expect_same(a.expert_mean, b.expert_mean);
  expect_same(a.router_v, b.router_v);
  expect_same(a.router_u, b.router_u);
  expect_same(a.router_bias, b.router_bias);
  expect_same(a.bypass_q, b.bypass_q);
  expect_same(a.bypass_p, b.bypass_p);
  expect_same(a.bias, b.bias);
}

class SecretMoeFile : public ::testing::Test {
 protected:
  SecretMoeFile() {
    config_.n_layers = 2;
    config_.d_model = kModel;
    config_.phi = kernels::Activation::GeluTanh;
  }

  std::shared_ptr<const GgufFile> reopen(const GgufWriter& w) {
    const std::filesystem::path path = folder_.path() / "hybrid.gguf";
    w.write(path);
    return GgufFile::open(path);
  }

  /// The error of reading layer 1 after `spoil` changed the layer and the metadata.
  std::string error(const std::function<void(PackedSecretMoe&, GgufWriter&)>& spoil) {
    PackedSecretMoe p = packed_layer();
    GgufWriter w = hybrid_writer();
    spoil(p, w);
    p.add_to(w, 1);
    const auto file = reopen(w);
    return error_of<FormatError>([&] { read_secret_moe(*file, config_, 1); });
  }

  TempFolder folder_;
  ModelConfig config_;
};

TEST_F(SecretMoeFile, ComesBackAsItWas) {
  const PackedSecretMoe p = packed_layer();
  GgufWriter w = hybrid_writer();
  p.add_to(w, 1);
  const auto file = reopen(w);
  EXPECT_TRUE(is_hybrid(*file));
  EXPECT_FALSE(read_secret_moe(*file, config_, 0).has_value());
  const auto view = read_secret_moe(*file, config_, 1);
  ASSERT_TRUE(view.has_value());
  expect_same(*view, p.view());
  EXPECT_EQ(view->d_model(), kModel);
  EXPECT_EQ(view->n_shared(), kShared);
  EXPECT_EQ(view->n_experts(), kExperts);
  EXPECT_EQ(view->router_rank(), kRank);
  EXPECT_EQ(view->bypass_rank(), kBypass);
  EXPECT_NO_THROW(kernels::check_shapes(*view));
  // One expert is one contiguous read of three rows.
  EXPECT_EQ(file->find_tensor("blk.1.moe.experts.weight")->dims,
            (std::vector<std::int64_t>{kExperts, 3, kModel}));
}

TEST_F(SecretMoeFile, SharedAndBypassMayBeAbsent) {
  const PackedSecretMoe p = packed_layer(0, 0);
  GgufWriter w = hybrid_writer();
  p.add_to(w, 1);
  const auto file = reopen(w);
  EXPECT_EQ(file->find_tensor("blk.1.moe.shared.weight"), nullptr);
  EXPECT_EQ(file->find_tensor("blk.1.moe.bypass_q.weight"), nullptr);
  const auto view = read_secret_moe(*file, config_, 1);
  ASSERT_TRUE(view.has_value());
  expect_same(*view, p.view());
  EXPECT_EQ(view->n_shared(), 0);
  EXPECT_EQ(view->bypass_rank(), 0);
  EXPECT_NO_THROW(kernels::check_shapes(*view));
}

TEST_F(SecretMoeFile, DenseFilesAreNotHybrid) {
  const auto plain = reopen(GgufWriter());
  EXPECT_FALSE(is_hybrid(*plain));
  EXPECT_FALSE(read_secret_moe(*plain, config_, 1).has_value());
  GgufWriter w = hybrid_writer();
  w.set(std::string(kKeyLayerKind), GgufValue::string_array({"dense", "dense"}));
  EXPECT_FALSE(is_hybrid(*reopen(w)));
}

TEST_F(SecretMoeFile, UnknownVersionAndKindListTheKnown) {
  EXPECT_PRED2(ends_with, error([](auto&, auto& w) {
                 w.set(std::string(kKeyFormatVersion), GgufValue::u32(2));
               }),
               "hybrid.gguf: moesaic.format_version is 2, expected 1");
  EXPECT_PRED2(
      contains, error([](auto&, auto& w) {
        w.set(std::string(kKeyLayerKind), GgufValue::string_array({"dense", "peer"}));
      }),
      "layer 1 is of kind \"peer\", expected one of dense, glu+low_rank, glu+gate, glu+input, or ");
}

TEST_F(SecretMoeFile, MetadataHasOneEntryPerLayer) {
  EXPECT_PRED2(ends_with, error([](auto&, auto& w) {
                 w.set(std::string(kKeyLayerKind), GgufValue::string_array({"glu+low_rank"}));
               }),
               "moesaic.layer.kind has 1 entries, expected 2, one per layer");
  EXPECT_PRED2(ends_with, error([](auto&, auto& w) {
                 w.set(std::string(kKeyLayerActive), GgufValue::u32_array({0, 2, 2}));
               }),
               "moesaic.layer.n_active has 3 entries, expected 2, one per layer");
}

TEST_F(SecretMoeFile, ActiveExpertsAreFewerThanExperts) {
  const auto with_active = [&](std::uint64_t k) {
    return error([&](auto&, auto& w) {
      w.set(std::string(kKeyLayerActive), GgufValue::u32_array({0, k}));
    });
  };
  EXPECT_EQ(with_active(0), "nothing thrown");
  EXPECT_EQ(with_active(kExperts), "nothing thrown");
  EXPECT_PRED2(ends_with, with_active(kExperts + 1),
               "moesaic.layer.n_active of layer 1 is 6, expected 0 to 5, the number of experts");
}

TEST_F(SecretMoeFile, WrongModelWidthIsNamed) {
  config_.d_model = 2 * kModel;
  EXPECT_PRED2(ends_with, error([](auto&, auto&) {}),
               "blk.1.moe.experts.weight is [5, 3, 64], expected [5, 3, 128]");
}

/// Layer 1's tensors as names, dims and bytes, so that one can be dropped or changed.
struct Part {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> dims;
  std::vector<std::byte> data;
};

TEST_F(SecretMoeFile, MissingOrMisshapenTensorsAreNamed) {
  const PackedSecretMoe p = packed_layer();
  GgufWriter whole = hybrid_writer();
  p.add_to(whole, 1);
  const auto source = reopen(whole);
  std::vector<Part> parts;
  for (const GgufTensor& t : source->tensors()) {
    parts.push_back({t.name, t.dtype, t.dims, {t.data, t.data + t.bytes}});
  }
  ASSERT_EQ(parts.size(), 9u);
  const auto read = [&](const std::vector<Part>& changed) {
    GgufWriter w = hybrid_writer();
    for (const Part& part : changed) w.add_tensor(part.name, part.dtype, part.dims, part.data);
    const auto file = reopen(w);
    return error_of<FormatError>([&] { read_secret_moe(*file, config_, 1); });
  };
  EXPECT_EQ(read(parts), "nothing thrown");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    SCOPED_TRACE(parts[i].name);
    std::vector<Part> without = parts;
    without.erase(without.begin() + static_cast<std::ptrdiff_t>(i));
    const bool optional = parts[i].name == "blk.1.moe.shared.weight";
    if (optional) {
      EXPECT_EQ(read(without), "nothing thrown");
    } else {
      EXPECT_PRED2(contains, read(without), parts[i].name + " is missing");
    }

    // One more row (or element) than fits: some tensor's shape is then named.
    std::vector<Part> longer = parts;
    longer[i].dims[0] += 1;
    const std::size_t row = parts[i].data.size() / static_cast<std::size_t>(parts[i].dims[0]);
    longer[i].data.resize(parts[i].data.size() + row);
    if (!optional) {
      const std::string text = read(longer);
      EXPECT_PRED2(contains, text, "hybrid.gguf: blk.1.moe.");
      EXPECT_PRED2(contains, text, ", expected [");
    }

    std::vector<Part> flat = parts;
    flat[i].dims = {1, 1, 1, 1};
    flat[i].dtype = DType::F32;
    flat[i].data.resize(4);
    EXPECT_PRED2(contains, read(flat), parts[i].name + " is [1, 1, 1, 1], expected ");
  }
}

TEST_F(SecretMoeFile, VectorsAreFloat32) {
  const PackedSecretMoe p = packed_layer();
  GgufWriter source = hybrid_writer();
  p.add_to(source, 1);
  const auto file = reopen(source);
  GgufWriter w = hybrid_writer();
  for (const GgufTensor& t : file->tensors()) {
    const bool bias = t.name == "blk.1.moe.bias";
    const auto bytes = static_cast<std::size_t>(bias ? t.bytes / 2 : t.bytes);
    w.add_tensor(t.name, bias ? DType::F16 : t.dtype, t.dims, {t.data, bytes});
  }
  const auto changed = reopen(w);
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { read_secret_moe(*changed, config_, 1); }),
               "blk.1.moe.bias is of type F16, expected F32");
}

TEST_F(SecretMoeFile, BuffersOfTheWrongSizeAreRefusedWhenAdded) {
  PackedSecretMoe p = packed_layer();
  p.experts = some_bytes(p.expert_dtype, 3 * kExperts - 1, kModel);
  GgufWriter w = hybrid_writer();
  EXPECT_PRED2(contains, error_of<ShapeError>([&] { p.add_to(w, 1); }),
               "blk.1.moe.experts.weight: ");
}

}  // namespace
}  // namespace moesaic::models
