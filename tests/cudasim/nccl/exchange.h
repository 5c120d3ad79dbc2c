#pragma once

#include <string>
#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim::nccl {

/// What a rank calls; equal on all ranks of a collective but for `rank`.
struct Call {
  char name[24] = "";
  u64 count = 0;
  int type = 0;
  int op = 0;
  int root = 0;
  int rank = 0;

  std::string text() const;
  bool matches(const Call& other) const;
};

/// How ranks exchange data, in one process or several: a folder in shared memory, named by the
/// unique id, with a file for each call of each rank. A file appears whole, by renaming; that it is
/// there says that the rank has come to the call.
class Exchange {
 public:
  Exchange(const std::string& id, int rank, int ranks);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  void post(const std::string& key, const Call& call, const void* data, std::size_t bytes);
  bool posted(const std::string& key, int rank) const;
  /// What a rank posted. Throws Error if it is not there.
  std::vector<std::byte> read(const std::string& key, int rank, Call& call) const;
  void forget(const std::string& key) const;
  /// Messages that nobody has received, named by their files.
  std::vector<std::string> left_over() const;

 private:
  std::string path(const std::string& key, int rank) const;

  std::string folder_;
  int rank_;
  int ranks_;
};

}  // namespace cudasim::nccl
