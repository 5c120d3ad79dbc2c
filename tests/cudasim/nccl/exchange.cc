#include "tests/cudasim/nccl/exchange.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

namespace cudasim::nccl {

namespace fs = std::filesystem;

std::string Call::text() const {
  return fmt::format("{}(count {}, type {}, op {}, root {})", name, count, type, op, root);
}

bool Call::matches(const Call& o) const {
  return std::strcmp(name, o.name) == 0 && count == o.count && type == o.type && op == o.op &&
         root == o.root;
}

Exchange::Exchange(const std::string& id, int rank, int ranks)
    : folder_("/dev/shm/" + id), rank_(rank), ranks_(ranks) {
  fs::create_directories(folder_);
}

// The last rank to leave removes the folder.
Exchange::~Exchange() {
  std::error_code ignored;
  std::ofstream(fmt::format("{}/left-{}", folder_, rank_)).put('\n');
  for (int r = 0; r < ranks_; ++r) {
    if (!fs::exists(fmt::format("{}/left-{}", folder_, r), ignored)) return;
  }
  fs::remove_all(folder_, ignored);
}

std::string Exchange::path(const std::string& key, int rank) const {
  return fmt::format("{}/{}-{}", folder_, key, rank);
}

void Exchange::post(const std::string& key, const Call& call, const void* data, std::size_t bytes) {
  const std::string file = path(key, rank_);
  const std::string part = fmt::format("{}.part{}", file, getpid());
  {
    std::ofstream out(part, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&call), sizeof call);
    out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
    if (!out.flush()) fail("{}: cannot write", part);
  }
  fs::rename(part, file);
}

bool Exchange::posted(const std::string& key, int rank) const {
  return access(path(key, rank).c_str(), F_OK) == 0;
}

std::vector<std::byte> Exchange::read(const std::string& key, int rank, Call& call) const {
  std::ifstream in(path(key, rank), std::ios::binary | std::ios::ate);
  if (!in) fail("NCCL: rank {} is not there", rank);
  const auto size = static_cast<std::size_t>(in.tellg());
  in.seekg(0);
  in.read(reinterpret_cast<char*>(&call), sizeof call);
  std::vector<std::byte> data(size - sizeof call);
  in.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size()));
  return data;
}

void Exchange::forget(const std::string& key) const {
  std::error_code ignored;
  fs::remove(path(key, rank_), ignored);
}

std::vector<std::string> Exchange::left_over() const {
  std::vector<std::string> names;
  std::error_code ignored;
  const std::string mine = fmt::format("-{}", rank_);
  for (const auto& entry : fs::directory_iterator(folder_, ignored)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("message") && name.ends_with(mine)) names.push_back(name);
  }
  return names;
}

}  // namespace cudasim::nccl
