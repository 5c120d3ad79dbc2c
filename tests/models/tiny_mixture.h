#pragma once

#include "models/secret_moe_file.h"
#include "tests/models/gguf_bytes.h"
#include "tests/models/mixture_case.h"
#include "tests/models/tiny_model.h"

namespace moesaic::models {

/// A tiny model of a dense layer and one of the general form.
inline TinyModel tiny_mixture(const PackedMixture& p) {
  return TinyModel({.moe_layers = {1}}, [&](TinyModel& m) {
    std::erase_if(m.tensors, [](const auto& t) { return t.name.starts_with("blk.1.moe."); });
    m.set("moesaic.layer.kind", GgufValue::string_array({"dense", kind_name(p.kind)}));
    m.set("moesaic.layer.n_active",
          GgufValue::u32_array({0, static_cast<std::uint64_t>(p.n_active)}));
    const testing::TempFolder folder;
    GgufWriter w;
    p.add_to(w, 1);
    w.write(folder.path() / "layer.gguf");
    const auto file = GgufFile::open(folder.path() / "layer.gguf");
    for (const GgufTensor& t : file->tensors()) {
      m.tensors.push_back({t.name, t.dtype, t.dims, {t.data, t.data + t.bytes}});
    }
  });
}

}  // namespace moesaic::models
