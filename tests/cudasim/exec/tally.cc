#include "tests/cudasim/exec/tally.h"

namespace cudasim {
namespace {

void add_all(std::vector<u64>& to, const std::vector<u64>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) to[i] += from[i];
}

void add_traffic(Tally::Traffic& to, const Tally::Traffic& from) {
  to.requests += from.requests;
  to.sectors += from.sectors;
  to.ideal_sectors += from.ideal_sectors;
  to.bytes += from.bytes;
}

}  // namespace

void Tally::add(const Tally& o) {
  add_all(issued, o.issued);
  add_all(lanes, o.lanes);
  add_traffic(loads, o.loads);
  add_traffic(stores, o.stores);
  unique_read_bytes += o.unique_read_bytes;
  unique_written_bytes += o.unique_written_bytes;
  shared_requests += o.shared_requests;
  shared_wavefronts += o.shared_wavefronts;
  shared_ideal_wavefronts += o.shared_ideal_wavefronts;
  local_bytes += o.local_bytes;
  atomic_requests += o.atomic_requests;
  atomic_lanes += o.atomic_lanes;
  atomic_same_address += o.atomic_same_address;
  mma_flops += o.mma_flops;
  async_copies += o.async_copies;
  divergent_branches += o.divergent_branches;
}

}  // namespace cudasim
