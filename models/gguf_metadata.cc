#include <algorithm>
#include <array>
#include <limits>

#include "kernels/base/error.h"
#include "models/gguf.h"

namespace moesaic::models {
namespace {

constexpr std::string_view type_name(GgufType type) {
  constexpr std::array<std::string_view, 13> kNames = {
      "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64",
  };
  return kNames[static_cast<std::size_t>(type)];
}

/// What a value is called in an error: "u32", "array of string".
std::string described(const GgufValue& value) {
  if (value.type != GgufType::Array) return std::string(type_name(value.type));
  return fmt::format("array of {}", type_name(std::get<GgufArray>(value.value).type));
}

[[noreturn]] void throw_wrong_type(const GgufFile& file, std::string_view key,
                                   const GgufValue& value, std::string_view expected) {
  throw FormatError(fmt::format("{}: metadata key {} is of type {}, expected {}",
                                file.path().string(), key, described(value), expected));
}

const GgufValue& find_or_throw(const GgufFile& file, std::string_view key) {
  const GgufValue* value = file.find(key);
  require<FormatError>(value != nullptr, "{}: metadata key {} is missing", file.path().string(),
                       key);
  return *value;
}

std::int64_t narrow(const GgufFile& file, std::string_view key, std::uint64_t value) {
  require<FormatError>(value <= std::numeric_limits<std::int64_t>::max(),
                       "{}: metadata key {} is {}, expected less than 2^63", file.path().string(),
                       key, value);
  return static_cast<std::int64_t>(value);
}

/// The array's items if they are a vector of T and its type is not Bool.
template <class T>
const std::vector<T>* items_of(const GgufValue& value) {
  const auto* array = std::get_if<GgufArray>(&value.value);
  if (array == nullptr || array->type == GgufType::Bool) return nullptr;
  return std::get_if<std::vector<T>>(&array->items);
}

std::string shape(std::span<const std::int64_t> dims) {
  return fmt::format("[{}]", fmt::join(dims, ", "));
}

}  // namespace

GgufValue GgufValue::u32(std::uint32_t v) { return {GgufType::U32, std::uint64_t{v}}; }
GgufValue GgufValue::u64(std::uint64_t v) { return {GgufType::U64, v}; }
GgufValue GgufValue::f32(float v) { return {GgufType::F32, double{v}}; }
GgufValue GgufValue::f64(double v) { return {GgufType::F64, v}; }
GgufValue GgufValue::boolean(bool v) { return {GgufType::Bool, v}; }
GgufValue GgufValue::string(std::string v) { return {GgufType::String, std::move(v)}; }
GgufValue GgufValue::f32_array(std::vector<double> v) {
  return {GgufType::Array, GgufArray{GgufType::F32, std::move(v)}};
}
GgufValue GgufValue::u32_array(std::vector<std::uint64_t> v) {
  return {GgufType::Array, GgufArray{GgufType::U32, std::move(v)}};
}
GgufValue GgufValue::string_array(std::vector<std::string> v) {
  return {GgufType::Array, GgufArray{GgufType::String, std::move(v)}};
}

std::string GgufFile::get_string(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  const auto* text = std::get_if<std::string>(&value.value);
  if (text == nullptr) throw_wrong_type(*this, key, value, "string");
  return *text;
}

std::string GgufFile::get_string(std::string_view key, std::string fallback) const {
  return find(key) == nullptr ? std::move(fallback) : get_string(key);
}

std::int64_t GgufFile::get_int(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  if (const auto* v = std::get_if<std::int64_t>(&value.value)) return *v;
  if (const auto* v = std::get_if<std::uint64_t>(&value.value)) return narrow(*this, key, *v);
  throw_wrong_type(*this, key, value, "an integer");
}

std::int64_t GgufFile::get_int(std::string_view key, std::int64_t fallback) const {
  return find(key) == nullptr ? fallback : get_int(key);
}

double GgufFile::get_float(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  if (const auto* v = std::get_if<double>(&value.value)) return *v;
  throw_wrong_type(*this, key, value, "f32 or f64");
}

double GgufFile::get_float(std::string_view key, double fallback) const {
  return find(key) == nullptr ? fallback : get_float(key);
}

bool GgufFile::get_bool(std::string_view key, bool fallback) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  if (const auto* v = std::get_if<bool>(&value->value)) return *v;
  throw_wrong_type(*this, key, *value, "bool");
}

std::vector<std::string> GgufFile::get_strings(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  if (const auto* items = items_of<std::string>(value)) return *items;
  throw_wrong_type(*this, key, value, "array of string");
}

std::vector<double> GgufFile::get_floats(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  if (const auto* items = items_of<double>(value)) return *items;
  throw_wrong_type(*this, key, value, "array of f32 or f64");
}

std::vector<std::int64_t> GgufFile::get_ints(std::string_view key) const {
  const GgufValue& value = find_or_throw(*this, key);
  if (const auto* items = items_of<std::int64_t>(value)) return *items;
  if (const auto* items = items_of<std::uint64_t>(value)) {
    std::vector<std::int64_t> ints;
    ints.reserve(items->size());
    for (const std::uint64_t item : *items) ints.push_back(narrow(*this, key, item));
    return ints;
  }
  throw_wrong_type(*this, key, value, "array of integers");
}

const GgufTensor& GgufFile::expect(std::string_view name,
                                   std::span<const std::int64_t> dims) const {
  const GgufTensor* tensor = find_tensor(name);
  require<FormatError>(tensor != nullptr, "{}: {} is missing, expected {}", path_.string(), name,
                       shape(dims));
  require<FormatError>(
      std::equal(dims.begin(), dims.end(), tensor->dims.begin(), tensor->dims.end()),
      "{}: {} is {}, expected {}", path_.string(), name, shape(tensor->dims), shape(dims));
  return *tensor;
}

}  // namespace moesaic::models
