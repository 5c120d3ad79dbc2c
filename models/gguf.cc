#include "models/gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>
#include <type_traits>

#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are mapped as they are");

constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint32_t kMaxDims = 4;

/// Bytes of one value of fixed size; 0 for strings and arrays.
constexpr std::uint64_t type_bytes(GgufType type) {
  constexpr std::array<std::uint64_t, 13> kBytes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kBytes[static_cast<std::size_t>(type)];
}

/// ggml's name of a tensor type, for the error about one that moesaic does not read.
std::string ggml_type_name(std::uint32_t id) {
  constexpr std::array<std::pair<std::uint32_t, std::string_view>, 22> kOthers = {{
      {9, "Q8_1"},    {10, "Q2_K"},    {11, "Q3_K"},  {15, "Q8_K"},   {16, "IQ2_XXS"},
      {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"},
      {22, "IQ2_S"},  {23, "IQ4_XS"},  {24, "I8"},    {25, "I16"},    {26, "I32"},
      {27, "I64"},    {28, "F64"},     {29, "IQ1_M"}, {34, "TQ1_0"},  {35, "TQ2_0"},
      {39, "MXFP4"},  {40, "NVFP4"},
  }};
  for (const auto& [other, name] : kOthers) {
    if (other == id) return fmt::format("{} ({})", name, id);
  }
  return fmt::format("{}", id);
}

std::string readable_dtypes() {
  std::string list;
  for (const DTypeTraits& t : kDTypes) list += (list.empty() ? "" : ", ") + std::string(t.name);
  return list;
}

/// A name from the file as it may stand in a one-line message.
std::string shown(std::string_view name) {
  constexpr std::size_t kLongest = 80;
  std::string text;
  for (const char c : name.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    text += byte < 0x20 || byte == 0x7f ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return name.size() > kLongest ? text + "…" : text;
}

std::string shown(std::span<const std::int64_t> dims) {
  return fmt::format("[{}]", fmt::join(dims, ", "));
}

/// Reads the header front to back; nothing is read or allocated that the file's size does not
/// cover.
class Cursor {
 public:
  Cursor(const std::string& file, const std::byte* data, std::size_t size)
      : file_(file), data_(data), size_(size) {}

  std::size_t position() const { return position_; }
  std::size_t remaining() const { return size_ - position_; }

  /// The next n bytes.
  const std::byte* take(std::uint64_t n, std::string_view what) {
    require<FormatError>(n <= remaining(),
                         "{}: {} at byte {} needs {} bytes, found {} to the end of the file "
                         "(truncated or corrupt)",
                         file_, what, position_, n, remaining());
    const std::byte* p = data_ + position_;
    position_ += static_cast<std::size_t>(n);
    return p;
  }

  template <class T>
  T read(std::string_view what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }

  std::string read_string(std::string_view what) {
    const auto length = read<std::uint64_t>(what);
    const std::byte* p = take(length, what);
    return {reinterpret_cast<const char*>(p), static_cast<std::size_t>(length)};
  }

  /// A count of things that take at least `smallest` bytes each.
  std::uint64_t check_count(std::uint64_t n, std::uint64_t smallest, std::string_view what) const {
    require<FormatError>(n <= remaining() / smallest,
                         "{}: {} {} at byte {}, expected at most {} in the {} bytes that follow "
                         "(truncated or corrupt)",
                         file_, n, what, position_, remaining() / smallest, remaining());
    return n;
  }

 private:
  const std::string& file_;
  const std::byte* data_;
  std::size_t size_;
  std::size_t position_ = 0;
};

GgufType read_type(Cursor& in, const std::string& file, const std::string& key) {
  const auto id = in.read<std::uint32_t>("a metadata type");
  require<FormatError>(id <= static_cast<std::uint32_t>(GgufType::F64),
                       "{}: metadata key {} is of type {}, expected 0 to 12", file, shown(key), id);
  return static_cast<GgufType>(id);
}

bool read_bool(Cursor& in, const std::string& file, const std::string& key) {
  const auto byte = in.read<std::uint8_t>("a bool");
  require<FormatError>(byte <= 1, "{}: metadata key {} is a bool of value {}, expected 0 or 1",
                       file, shown(key), byte);
  return byte == 1;
}

/// Calls fn with a value of the C++ type of a number type of the file.
template <class Fn>
auto visit_number(GgufType type, Fn&& fn) {
  switch (type) {
    case GgufType::U8:
      return fn(std::uint8_t{});
    case GgufType::I8:
      return fn(std::int8_t{});
    case GgufType::U16:
      return fn(std::uint16_t{});
    case GgufType::I16:
      return fn(std::int16_t{});
    case GgufType::I32:
      return fn(std::int32_t{});
    case GgufType::U64:
      return fn(std::uint64_t{});
    case GgufType::I64:
      return fn(std::int64_t{});
    case GgufType::F32:
      return fn(float{});
    case GgufType::F64:
      return fn(double{});
    default:
      return fn(std::uint32_t{});
  }
}

/// What a number of the file is widened to.
template <class T>
using Widened =
    std::conditional_t<std::is_floating_point_v<T>, double,
                       std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>;

GgufArray read_array(Cursor& in, const std::string& file, const std::string& key) {
  GgufArray array;
  array.type = read_type(in, file, key);
  require<FormatError>(array.type != GgufType::Array,
                       "{}: metadata key {} is an array of arrays, expected an array of numbers, "
                       "bools or strings",
                       file, shown(key));
  const auto n = in.read<std::uint64_t>("an array length");
  if (array.type == GgufType::String) {
    in.check_count(n, sizeof(std::uint64_t), "strings");
    std::vector<std::string> items;
    for (std::uint64_t i = 0; i < n; ++i) items.push_back(in.read_string("a string of an array"));
    array.items = std::move(items);
  } else if (array.type == GgufType::Bool) {
    in.check_count(n, 1, "bools");
    std::vector<std::uint64_t> items;
    for (std::uint64_t i = 0; i < n; ++i) items.push_back(read_bool(in, file, key) ? 1 : 0);
    array.items = std::move(items);
  } else {
    in.check_count(n, type_bytes(array.type), "array elements");
    visit_number(array.type, [&](auto zero) {
      using T = decltype(zero);
      std::vector<Widened<T>> items(static_cast<std::size_t>(n));
      for (auto& item : items) item = in.read<T>("an array element");
      array.items = std::move(items);
    });
  }
  return array;
}

GgufValue read_value(Cursor& in, const std::string& file, const std::string& key) {
  GgufValue value;
  value.type = read_type(in, file, key);
  if (value.type == GgufType::Array) {
    value.value = read_array(in, file, key);
  } else if (value.type == GgufType::String) {
    value.value = in.read_string("a string");
  } else if (value.type == GgufType::Bool) {
    value.value = read_bool(in, file, key);
  } else {
    visit_number(value.type, [&](auto zero) {
      using T = decltype(zero);
      value.value = static_cast<Widened<T>>(in.read<T>("a metadata value"));
    });
  }
  return value;
}

/// A tensor's entry in the header: `data` not set yet, `offset` from the start of the data.
struct TensorInfo {
  GgufTensor tensor;
  std::uint64_t offset = 0;
};

TensorInfo read_tensor_info(Cursor& in, const std::string& file, std::uint64_t index) {
  TensorInfo info;
  GgufTensor& t = info.tensor;
  t.name = in.read_string("a tensor name");
  require<FormatError>(!t.name.empty(), "{}: tensor {} has no name", file, index);
  const std::string name = shown(t.name);

  const auto n_dims = in.read<std::uint32_t>("a number of dimensions");
  require<FormatError>(n_dims >= 1 && n_dims <= kMaxDims,
                       "{}: {} has {} dimensions, expected 1 to {}", file, name, n_dims, kMaxDims);
  std::int64_t n_elements = 1;
  for (std::uint32_t i = 0; i < n_dims; ++i) {
    const auto n = in.read<std::uint64_t>("a dimension");
    require<FormatError>(
        n >= 1 && n <= std::numeric_limits<std::int64_t>::max() &&
            !__builtin_mul_overflow(n_elements, static_cast<std::int64_t>(n), &n_elements),
        "{}: {} has dimension {} of size {}, expected at least 1 and fewer than "
        "2^63 elements in all",
        file, name, i, n);
    t.dims.insert(t.dims.begin(), static_cast<std::int64_t>(n));
  }

  const auto type_id = in.read<std::uint32_t>("a tensor type");
  const std::optional<DType> dtype = dtype_from_ggml(type_id);
  require<FormatError>(dtype.has_value(), "{}: {} is of type {}, expected one of {}", file, name,
                       ggml_type_name(type_id), readable_dtypes());
  t.dtype = *dtype;
  const DTypeTraits& traits = moesaic::traits(t.dtype);
  require<FormatError>(t.dims.back() % traits.block_elems == 0,
                       "{}: {} is {} of {}, expected rows of a multiple of {} elements", file, name,
                       shown(t.dims), traits.name, traits.block_elems);
  require<FormatError>(
      !__builtin_mul_overflow(n_elements / traits.block_elems, traits.block_bytes, &t.bytes),
      "{}: {} is {}, expected fewer than 2^63 bytes", file, name, shown(t.dims));
  info.offset = in.read<std::uint64_t>("a tensor offset");
  return info;
}

/// Sets each tensor's data pointer after checking that all lie in the file, aligned and apart.
void place_tensors(std::vector<TensorInfo>& infos, const std::string& file, const std::byte* map,
                   std::uint64_t size, std::uint64_t header_end, std::uint64_t alignment) {
  if (infos.empty()) return;
  const std::uint64_t start = (header_end + alignment - 1) / alignment * alignment;
  const std::uint64_t data_bytes = start <= size ? size - start : 0;
  for (TensorInfo& info : infos) {
    GgufTensor& t = info.tensor;
    require<FormatError>(info.offset % alignment == 0,
                         "{}: {} is at offset {}, expected a multiple of {}", file, shown(t.name),
                         info.offset, alignment);
    require<FormatError>(
        info.offset <= data_bytes &&
            static_cast<std::uint64_t>(t.bytes) <= data_bytes - info.offset,
        "{}: {} takes {} bytes from offset {} of the data, found {} bytes of data (truncated or "
        "corrupt)",
        file, shown(t.name), t.bytes, info.offset, data_bytes);
    t.data = map + start + info.offset;
  }
  std::vector<const GgufTensor*> order;
  for (const TensorInfo& info : infos) order.push_back(&info.tensor);
  std::sort(order.begin(), order.end(),
            [](const GgufTensor* a, const GgufTensor* b) { return a->data < b->data; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    require<FormatError>(order[i - 1]->data + order[i - 1]->bytes <= order[i]->data,
                         "{}: {} and {} overlap", file, shown(order[i - 1]->name),
                         shown(order[i]->name));
  }
}

/// An open file that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void throw_errno(const std::string& file, std::string_view action) {
  const int error = errno;
  throw IoError(
      fmt::format("{}: cannot {}: {}", file, action, std::generic_category().message(error)));
}

}  // namespace

std::int64_t GgufTensor::n_elements() const {
  std::int64_t n = 1;
  for (const std::int64_t d : dims) n *= d;
  return n;
}

WeightView GgufTensor::matrix() const {
  WeightView view;
  view.data = data;
  view.dtype = dtype;
  view.cols = dims.back();
  view.rows = n_elements() / view.cols;
  return view;
}

std::shared_ptr<const GgufFile> GgufFile::open(const std::filesystem::path& path) {
  const std::string file = path.string();
  // Non-blocking, so that a FIFO is an error and not a wait.
  const Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (descriptor.get() < 0) throw_errno(file, "open");
  struct stat status {};
  if (::fstat(descriptor.get(), &status) != 0) throw_errno(file, "read");
  require<IoError>(!S_ISDIR(status.st_mode), "{}: is a folder, expected a GGUF file", file);
  require<IoError>(S_ISREG(status.st_mode), "{}: is not a regular file, expected a GGUF file",
                   file);
  require<FormatError>(status.st_size > 0, "{}: is empty, expected a GGUF file", file);

  std::shared_ptr<GgufFile> gguf(new GgufFile);
  gguf->path_ = path;
  const auto size = static_cast<std::size_t>(status.st_size);
  void* map = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (map == MAP_FAILED) throw_errno(file, "map");
  gguf->map_ = static_cast<const std::byte*>(map);
  gguf->size_ = size;

  Cursor in(file, gguf->map_, size);
  constexpr std::string_view kMagic = "GGUF";
  const std::byte* magic = in.take(kMagic.size(), "the magic \"GGUF\"");
  const auto byte = [&](int i) { return static_cast<unsigned>(magic[i]); };
  require<FormatError>(std::memcmp(magic, kMagic.data(), kMagic.size()) == 0,
                       "{}: found {:02x} {:02x} {:02x} {:02x} at the start, expected \"GGUF\"",
                       file, byte(0), byte(1), byte(2), byte(3));
  gguf->version_ = in.read<std::uint32_t>("the version");
  const std::uint32_t version = gguf->version_;
  require<FormatError>((version & 0xffffu) != 0 || version == 0,
                       "{}: is a big-endian GGUF file, expected little-endian", file);
  require<FormatError>(version == 2 || version == 3, "{}: is GGUF version {}, expected 2 or 3",
                       file, version);
  const auto n_tensors = in.read<std::uint64_t>("the number of tensors");
  const auto n_keys = in.read<std::uint64_t>("the number of metadata keys");
  constexpr std::uint64_t kSmallestKey = 8 + 4 + 1;                 // empty key, type, one byte
  constexpr std::uint64_t kSmallestTensor = 8 + 1 + 4 + 8 + 4 + 8;  // name, dims, type, offset
  in.check_count(n_keys, kSmallestKey, "metadata keys");
  in.check_count(n_tensors, kSmallestTensor, "tensors");

  for (std::uint64_t i = 0; i < n_keys; ++i) {
    std::string key = in.read_string("a metadata key");
    require<FormatError>(!key.empty(), "{}: metadata key {} has no name", file, i);
    const bool is_new = gguf->key_index_.emplace(key, gguf->metadata_.size()).second;
    require<FormatError>(is_new, "{}: metadata key {} is there twice", file, shown(key));
    GgufValue value = read_value(in, file, key);
    gguf->metadata_.emplace_back(std::move(key), std::move(value));
  }
  std::vector<TensorInfo> infos;
  for (std::uint64_t i = 0; i < n_tensors; ++i) {
    infos.push_back(read_tensor_info(in, file, i));
    const std::string& name = infos.back().tensor.name;
    const bool is_new = gguf->tensor_index_.emplace(name, infos.size() - 1).second;
    require<FormatError>(is_new, "{}: tensor {} is there twice", file, shown(name));
  }

  const std::int64_t alignment = gguf->get_int("general.alignment", kDefaultAlignment);
  require<FormatError>(alignment >= 8 && alignment <= (std::int64_t{1} << 30) &&
                           std::has_single_bit(static_cast<std::uint64_t>(alignment)),
                       "{}: general.alignment is {}, expected a power of two from 8 to 2^30", file,
                       alignment);
  place_tensors(infos, file, gguf->map_, size, in.position(),
                static_cast<std::uint64_t>(alignment));
  for (TensorInfo& info : infos) gguf->tensors_.push_back(std::move(info.tensor));
  return gguf;
}

GgufFile::~GgufFile() {
  if (map_ != nullptr) ::munmap(const_cast<std::byte*>(map_), size_);
}

void GgufFile::drop_pages() const { ::madvise(const_cast<std::byte*>(map_), size_, MADV_DONTNEED); }

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto it = key_index_.find(key);
  return it == key_index_.end() ? nullptr : &metadata_[it->second].second;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

}  // namespace moesaic::models
