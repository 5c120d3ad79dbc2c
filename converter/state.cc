#include "converter/state.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <system_error>

#include "converter/digest.h"
#include "kernels/base/error.h"
#include "models/gguf_writer.h"

namespace moesaic::converter {
namespace {

static_assert(std::endian::native == std::endian::little, "calibration.u32 is written as it is");

using Json = nlohmann::ordered_json;

constexpr std::string_view kJob = "job.json";
constexpr std::string_view kCalibration = "calibration.u32";
constexpr std::string_view kCalibrationDigest = "calibration.json";
constexpr std::string_view kPlan = "plan.json";
constexpr std::string_view kTime = "time.json";
constexpr std::string_view kHybrid = "hybrid.gguf";
constexpr std::string_view kTraining = "training.gguf";
constexpr std::string_view kScales = "scales.gguf";

// A layer's report in its metadata, besides the keys that its reader needs.
constexpr std::string_view kKeyLayer = "moesaic.state.layer";
constexpr std::string_view kKeyFraction = "moesaic.state.active_fraction";
constexpr std::string_view kKeySensitivity = "moesaic.state.sensitivity";
constexpr std::string_view kKeyClosedForm = "moesaic.state.error_closed_form";
constexpr std::string_view kKeyDistilled = "moesaic.state.error_distilled";
constexpr std::string_view kKeyUsage = "moesaic.state.expert_usage";

/// "layer-NNN.gguf".
bool is_layer_file(std::string_view name) {
  return name.starts_with("layer-") && name.ends_with(".gguf");
}

bool is_own_file(std::string_view name) {
  return name == kJob || name == kCalibration || name == kCalibrationDigest || name == kPlan ||
         name == kTime || name == kHybrid || name == kTraining || name == kScales ||
         is_layer_file(name);
}

/// What models::write_file_atomically names ".NAME.PID.N.tmp" while it writes NAME: gives NAME if
/// the process is gone, else nothing.
std::string leftover_of(std::string_view name) {
  if (!name.starts_with('.') || !name.ends_with(".tmp")) return {};
  name.remove_prefix(1);
  name.remove_suffix(4);
  const auto take_number = [&](int& number) {
    const std::size_t dot = name.rfind('.');
    if (dot == name.npos) return false;
    const char* end = name.data() + name.size();
    const auto [stop, error] = std::from_chars(name.data() + dot + 1, end, number);
    name = name.substr(0, dot);
    return error == std::errc() && stop == end;
  };
  int attempt = 0;
  int pid = 0;
  if (!take_number(attempt) || !take_number(pid) || pid <= 0) return {};
  const bool gone = ::kill(pid, 0) != 0 && errno == ESRCH;
  return gone ? std::string(name) : std::string();
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

/// Removes the files of a folder that `condemned` picks by name. What cannot be removed stays:
/// tidying up must not fail a conversion.
template <class Fn>
void remove_files(const std::filesystem::path& folder, Fn&& condemned) {
  std::error_code error;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    std::error_code ignored;
    if (entry.is_regular_file(ignored) && condemned(entry.path().filename().string())) {
      paths.push_back(entry.path());
    }
  }
  for (const auto& path : paths) std::filesystem::remove(path, error);
}

/// A whole file, or nothing if it is not there. Throws IoError.
std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  std::ifstream in(path, std::ios::binary);
  require<IoError>(in.good(), "{}: cannot open: {}", path.string(),
                   std::generic_category().message(errno));
  std::string text(std::istreambuf_iterator<char>(in), {});
  require<IoError>(!in.bad(), "{}: cannot read", path.string());
  return text;
}

[[noreturn]] void throw_damaged(const std::filesystem::path& path, std::string_view what,
                                std::string_view remedy) {
  throw FormatError(fmt::format("{}: damaged ({}); {}", path.string(), what, remedy));
}

/// Removing only this file costs only what it held.
std::string remove_file_remedy(std::string_view what) {
  return fmt::format("remove this file and run again with --resume: {} will be done anew", what);
}

std::string shown(const Json* value) { return value == nullptr ? "missing" : value->dump(); }

}  // namespace

StateFolder::StateFolder(const std::filesystem::path& output, const std::string& fingerprint_json,
                         bool resume)
    : path_(output.string() + ".state") {
  std::error_code error;
  std::filesystem::create_directory(path_, error);
  require<IoError>(!error, "{}: cannot create the folder: {}", path_.string(), error.message());
  lock_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  require<IoError>(lock_ >= 0, "{}: cannot open the folder: {}", path_.string(),
                   std::generic_category().message(errno));
  try {
    // A file system without locks (some network ones) is no reason to refuse work.
    require<InputError>(::flock(lock_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK,
                        "{}: another conversion is at work here, expected none", path_.string());
    const std::string output_name = output.filename().string();
    remove_files(path_, [](const std::string& name) { return is_own_file(leftover_of(name)); });
    remove_files(folder_of(output), [&](const std::string& name) {
      const std::string of = leftover_of(name);
      return of == output_name || of == output_name + ".report.json" ||
             of == output_name + ".report.html";
    });

    int n_layers = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      n_layers += is_layer_file(entry.path().filename().string()) ? 1 : 0;
    }
    const bool has_job = std::filesystem::exists(path_ / kJob);
    if (resume && (has_job || n_layers > 0)) {
      check_fingerprint(fingerprint_json);
      return;
    }
    require<InputError>(
        n_layers == 0,
        "{}: holds {} finished layer{} of an earlier run; pass --resume to continue "
        "it, or remove the folder to start over",
        path_.string(), n_layers, n_layers == 1 ? "" : "s");
    require<InputError>(
        !std::filesystem::exists(training_path()) && !std::filesystem::exists(scales_path()),
        "{}: holds an earlier run's training; pass --resume to continue it, or "
        "remove the folder to start over",
        path_.string());
    remove_files(path_, [](const std::string& name) { return is_own_file(name); });
    models::write_file_atomically(path_ / kJob, fingerprint_json);
  } catch (const std::filesystem::filesystem_error& e) {
    ::close(lock_);
    throw IoError(
        fmt::format("{}: cannot read the folder: {}", path_.string(), e.code().message()));
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

StateFolder::~StateFolder() { ::close(lock_); }

void StateFolder::check_fingerprint(const std::string& expected) const {
  const std::filesystem::path file = path_ / kJob;
  const std::string remedy = fmt::format("remove {} to start over", path_.string());
  const std::optional<std::string> text = read_file(file);
  if (!text) throw_damaged(file, "missing beside finished layers", remedy);
  const Json found = Json::parse(*text, nullptr, false);
  if (!found.is_object()) throw_damaged(file, "no JSON object", remedy);
  const Json wanted = Json::parse(expected);

  std::string differences;
  const auto compare = [&](const std::string& key) {
    const Json* there = found.contains(key) ? &found[key] : nullptr;
    const Json* here = wanted.contains(key) ? &wanted[key] : nullptr;
    if (there != nullptr && here != nullptr && *there == *here) return;
    differences += fmt::format("{}{} is {} there, {} now", differences.empty() ? "" : ", ", key,
                               shown(there), shown(here));
  };
  for (const auto& [key, value] : wanted.items()) compare(key);
  for (const auto& [key, value] : found.items()) {
    if (!wanted.contains(key)) compare(key);
  }
  require<InputError>(differences.empty(),
                      "{}: holds another conversion: {}; run with the same options, or remove the "
                      "folder to start over",
                      path_.string(), differences);
}

std::optional<std::vector<std::int32_t>> StateFolder::load_calibration() const {
  const std::filesystem::path file = path_ / kCalibration;
  const std::optional<std::string> note = read_file(path_ / kCalibrationDigest);
  if (!note) return std::nullopt;  // killed before it was whole
  const std::string remedy =
      fmt::format("remove {} to start over", path_.string());  // the layers were fitted on it
  const Json json = Json::parse(*note, nullptr, false);
  if (!json.is_object() || !json.contains("sha256")) {
    throw_damaged(path_ / kCalibrationDigest, "no SHA-256 in it", remedy);
  }
  const std::optional<std::string> bytes = read_file(file);
  if (!bytes) throw_damaged(file, "missing", remedy);
  const std::string digest = sha256(std::as_bytes(std::span(*bytes)));
  if (bytes->size() % sizeof(std::int32_t) != 0 || json["sha256"] != digest) {
    throw_damaged(file, fmt::format("SHA-256 is {}, expected {}", digest, json["sha256"].dump()),
                  remedy);
  }
  std::vector<std::int32_t> tokens(bytes->size() / sizeof(std::int32_t));
  std::memcpy(tokens.data(), bytes->data(), bytes->size());
  return tokens;
}

void StateFolder::save_calibration(const std::vector<std::int32_t>& tokens) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(tokens));
  models::write_file_atomically(path_ / kCalibration, bytes);
  const Json note = {{"n_tokens", tokens.size()}, {"sha256", sha256(bytes)}};
  models::write_file_atomically(path_ / kCalibrationDigest, note.dump() + "\n");
}

std::optional<std::string> StateFolder::load_plan() const {
  std::optional<std::string> text = read_file(path_ / kPlan);
  if (text && !Json::accept(*text)) {
    throw_damaged(path_ / kPlan, "no JSON", remove_file_remedy("the plan"));
  }
  return text;
}

void StateFolder::save_plan(const std::string& json) {
  models::write_file_atomically(path_ / kPlan, json);
}

std::filesystem::path StateFolder::layer_path(int layer) const {
  return path_ / fmt::format("layer-{:03}.gguf", layer);
}

std::optional<SavedLayer> StateFolder::load_layer(int layer,
                                                  const models::ModelConfig& config) const {
  const std::filesystem::path file = layer_path(layer);
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return std::nullopt;
  try {
    SavedLayer saved;
    saved.file = models::GgufFile::open(file);
    const models::GgufFile& gguf = *saved.file;
    LayerReport& r = saved.report;
    const std::int64_t found = gguf.get_int(kKeyLayer);
    require<FormatError>(found == layer, "{} is {}, expected {}", kKeyLayer, found, layer);
    r.layer = layer;
    r.active_fraction = gguf.get_float(kKeyFraction);
    r.sensitivity = gguf.get_float(kKeySensitivity);
    r.error_closed_form = gguf.get_float(kKeyClosedForm);
    r.error_distilled = gguf.get_float(kKeyDistilled);
    // The file has one kind a layer, all others dense; a layer that stays dense names itself alone.
    const std::vector<std::string> kinds = gguf.get_strings(models::kKeyLayerKind);
    const auto index = static_cast<std::size_t>(layer);
    require<FormatError>(index < kinds.size(), "{} has {} entries, expected at least {}",
                         models::kKeyLayerKind, kinds.size(), layer + 1);
    r.kind = kinds[index];
    if (r.kind == models::kKindDense) {
      saved.file = nullptr;
      return saved;
    }
    r.d_ff = config.d_ff;
    const auto take = [&](const auto& view) {
      kernels::check_shapes(view);
      saved.mlp = view;
      r.n_shared = view.n_shared();
      r.n_experts = view.n_experts();
      r.n_active = view.n_active;
      r.router_rank = view.router_rank();
      r.bypass_rank = view.bypass_rank();
    };
    if (const auto moe = models::read_secret_moe(gguf, config, layer)) {
      take(*moe);
    } else if (const auto mixture = models::read_mixture(gguf, config, layer)) {
      take(*mixture);
      r.expert_neurons = mixture->block;
    } else {
      throw FormatError(fmt::format("a layer of kind {}, expected one with a router", r.kind));
    }
    for (const double u : gguf.get_floats(kKeyUsage)) {
      r.expert_usage.push_back(static_cast<float>(u));
    }
    return saved;
  } catch (const Error& e) {
    if (dynamic_cast<const IoError*>(&e) != nullptr) throw;
    std::string_view what = e.what();
    const std::string prefix = file.string() + ": ";  // throw_damaged names the file
    if (what.starts_with(prefix)) what.remove_prefix(prefix.size());
    throw_damaged(file, what, remove_file_remedy("this layer and those after it"));
  }
}

namespace {

/// Metadata of a layer file: kinds and active counts of `n_layers` layers, this one's filled in.
models::GgufWriter layer_writer(const LayerReport& report, std::size_t n_layers) {
  using models::GgufValue;
  models::GgufWriter writer;
  const auto index = static_cast<std::size_t>(report.layer);
  std::vector<std::string> kinds(n_layers, std::string(models::kKindDense));
  kinds.at(index) = report.kind;
  std::vector<std::uint64_t> n_active(n_layers, 0);
  n_active.at(index) = static_cast<std::uint64_t>(report.n_active);
  const auto set = [&](std::string_view key, GgufValue value) {
    writer.set(std::string(key), std::move(value));
  };
  set(models::kKeyFormatVersion, GgufValue::u32(models::kSecretMoeFormatVersion));
  set(models::kKeyLayerKind, GgufValue::string_array(std::move(kinds)));
  set(models::kKeyLayerActive, GgufValue::u32_array(std::move(n_active)));
  set(kKeyLayer, GgufValue::u32(static_cast<std::uint32_t>(report.layer)));
  set(kKeyFraction, GgufValue::f64(report.active_fraction));
  set(kKeySensitivity, GgufValue::f64(report.sensitivity));
  set(kKeyClosedForm, GgufValue::f64(report.error_closed_form));
  set(kKeyDistilled, GgufValue::f64(report.error_distilled));
  set(kKeyUsage, GgufValue::f32_array({report.expert_usage.begin(), report.expert_usage.end()}));
  return writer;
}

}  // namespace

SavedLayer StateFolder::save_layer(const LayerReport& report, const models::PackedSecretMoe& packed,
                                   const models::ModelConfig& config) {
  models::GgufWriter writer = layer_writer(report, static_cast<std::size_t>(config.n_layers));
  packed.add_to(writer, report.layer);
  writer.write(layer_path(report.layer));
  // Read back: what goes on from here is what a resumed run would see.
  return *load_layer(report.layer, config);
}

SavedLayer StateFolder::save_layer(const LayerReport& report, const models::PackedMixture& packed,
                                   const models::ModelConfig& config) {
  models::GgufWriter writer = layer_writer(report, static_cast<std::size_t>(config.n_layers));
  packed.add_to(writer, report.layer);
  writer.write(layer_path(report.layer));
  return *load_layer(report.layer, config);
}

SavedLayer StateFolder::save_dense_layer(const LayerReport& report) {
  layer_writer(report, static_cast<std::size_t>(report.layer) + 1).write(layer_path(report.layer));
  return {report, nullptr, std::nullopt};
}

double StateFolder::seconds() const {
  const std::optional<std::string> text = read_file(path_ / kTime);
  if (!text) return 0;
  const Json json = Json::parse(*text, nullptr, false);
  if (!json.is_object() || !json.contains("seconds") || !json["seconds"].is_number()) {
    throw_damaged(path_ / kTime, "no seconds in it", remove_file_remedy("the count of time"));
  }
  return json["seconds"];
}

void StateFolder::add_seconds(double seconds) {
  const Json json = {{"seconds", this->seconds() + seconds}};
  models::write_file_atomically(path_ / kTime, json.dump() + "\n");
}

void StateFolder::remove() {
  // The fingerprint goes last: a kill in between leaves a folder that can still be resumed.
  remove_files(path_, [](const std::string& name) { return is_own_file(name) && name != kJob; });
  std::error_code ignored;
  std::filesystem::remove(path_ / kJob, ignored);
  std::filesystem::remove(path_, ignored);
}

}  // namespace moesaic::converter
