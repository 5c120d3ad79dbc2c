#include "tools/session.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>

#include "models/panels.h"
#include "models/secret_moe_file.h"
#include "tools/device.h"
#include "tools/output.h"
#include "tools/path_constants.h"

namespace moesaic::tools {
namespace {

std::vector<std::int32_t> parse_u32(const std::string& bytes, const std::filesystem::path& path,
                                    std::int64_t vocab_size) {
  require<FormatError>(bytes.size() % 4 == 0,
                       "{}: found {} bytes, expected a multiple of 4 (raw little-endian uint32)",
                       path.string(), bytes.size());
  std::vector<std::int32_t> ids(bytes.size() / 4);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    std::uint32_t id = 0;
    for (std::size_t b = 0; b < 4; ++b) {
      id |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[4 * i + b])) << (8 * b);
    }
    require<InputError>(id < vocab_size, "{}: id {} at index {}, expected less than {}",
                        path.string(), id, i, vocab_size);
    ids[i] = static_cast<std::int32_t>(id);
  }
  return ids;
}

std::vector<std::int32_t> parse_json_ids(const std::string& text, const std::filesystem::path& path,
                                         std::int64_t vocab_size) {
  const Json root = Json::parse(text, nullptr, false);
  require<FormatError>(!root.is_discarded(), "{}: not JSON, expected an array of token ids",
                       path.string());
  const Json* list = &root;
  if (root.is_object()) {
    for (const char* key : {"input_ids", "ids"}) {
      if (root.contains(key)) {
        list = &root[key];
        break;
      }
    }
  }
  require<FormatError>(
      list->is_array(), "{}: found {}, expected an array of token ids or an object with input_ids",
      path.string(),
      list->is_object() ? "an object without input_ids" : std::string(list->type_name()));
  std::vector<std::int32_t> ids;
  ids.reserve(list->size());
  for (const Json& item : *list) {
    require<FormatError>(item.is_number_integer(), "{}: element {} is {}, expected a token id",
                         path.string(), ids.size(), to_text(item, false).substr(0, 40));
    const auto id = item.get<std::int64_t>();
    require<InputError>(id >= 0 && id < vocab_size,
                        "{}: id {} at index {}, expected 0 or more and less than {}", path.string(),
                        id, ids.size(), vocab_size);
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return ids;
}

Activations parse_activations(const std::string& name) {
  if (name == "q16") return Activations::Q16;
  return name == "bf16" ? Activations::BF16 : Activations::F32;
}

std::shared_ptr<const models::Checkpoint> load(const std::filesystem::path& path, Context& context,
                                               bool on_cpu) {
  auto checkpoint = models::Checkpoint::load(path);
  if (!on_cpu || context.activations != Activations::Q16) return checkpoint;
  return with_path_constants(context, models::with_panels(*checkpoint, context.pool));
}

}  // namespace

Runtime::Runtime(const RunOptions& options)
    : pool(options.threads),
      context{pool, workspace, tally, parse_activations(options.activations)} {}

Model::Model(const std::filesystem::path& path, Context& context, const std::string& device)
    : checkpoint(load(path, context, device == "cpu")),
      tokenizer(models::load_tokenizer(*checkpoint->file)),
      transformer(checkpoint, context) {
  if (const auto gpu = cuda_device(device)) on_gpu = make_cuda_decoder(checkpoint, *gpu);
}

std::string read_input(const std::filesystem::path& path) {
  const bool standard_input = path == "-";
  std::FILE* file = standard_input ? stdin : std::fopen(path.c_str(), "rb");
  require<IoError>(file != nullptr, "{}: cannot read: {}", path.string(), std::strerror(errno));
  const auto close = [standard_input](std::FILE* f) {
    if (!standard_input) std::fclose(f);
  };
  const std::unique_ptr<std::FILE, decltype(close)> owner(file, close);
  std::string bytes;
  char buffer[1 << 16];
  errno = 0;
  while (const std::size_t n = std::fread(buffer, 1, sizeof(buffer), file)) bytes.append(buffer, n);
  require<IoError>(std::ferror(file) == 0, "{}: cannot read: {}", path.string(),
                   std::strerror(errno));
  return bytes;
}

std::string read_text(const std::filesystem::path& path) {
  std::string text = read_input(path);
  require<InputError>(!text.empty(), "{}: empty, expected UTF-8 text", path.string());
  models::check_utf8(text, path.string());
  return text;
}

std::vector<std::int32_t> read_ids(const std::filesystem::path& path, std::int64_t vocab_size) {
  const std::string bytes = read_input(path);
  std::vector<std::int32_t> ids = path.extension() == ".u32"
                                      ? parse_u32(bytes, path, vocab_size)
                                      : parse_json_ids(bytes, path, vocab_size);
  require<InputError>(!ids.empty(), "{}: empty, expected token ids", path.string());
  return ids;
}

std::vector<std::int32_t> read_data(const std::filesystem::path& path,
                                    const models::Tokenizer& tokenizer) {
  if (path.extension() == ".u32") return read_ids(path, tokenizer.vocab_size());
  return tokenizer.encode(read_text(path), models::SpecialTokens::Text);
}

void warn_beyond_context(const Model& model, std::int64_t n_ctx, engine::Monitor& monitor) {
  const std::int64_t trained = model.transformer.shape().context_length;
  if (n_ctx > trained) {
    monitor.line(
        fmt::format("warning: --n-ctx {} is more than the {} positions that {} was trained for",
                    n_ctx, trained, model.checkpoint->file->path().string()));
  }
}

TensorTotals tensor_totals(const models::GgufFile& file) {
  TensorTotals totals;
  for (const models::GgufTensor& tensor : file.tensors()) {
    totals.bytes += tensor.bytes;
    totals.elements += tensor.n_elements();
  }
  return totals;
}

std::string describe_model(const models::Checkpoint& checkpoint) {
  std::map<DType, std::int64_t> bytes;
  for (const models::GgufTensor& tensor : checkpoint.file->tensors()) {
    bytes[tensor.dtype] += tensor.bytes;
  }
  DType most = DType::F32;
  for (const auto& [dtype, n] : bytes) {
    if (n > bytes[most]) most = dtype;
  }
  return fmt::format("{} {} {}{}", checkpoint.config.architecture,
                     format_count(tensor_totals(*checkpoint.file).elements), traits(most).name,
                     models::is_hybrid(*checkpoint.file) ? " hybrid" : "");
}

}  // namespace moesaic::tools
