#include "tests/cudasim/runtime/graph.h"

#include <algorithm>
#include <random>

namespace cudasim {

GraphNode* Graph::add(Work work, std::vector<GraphNode*> after) {
  nodes.push_back(std::make_unique<GraphNode>());
  nodes.back()->work = std::move(work);
  nodes.back()->after = std::move(after);
  return nodes.back().get();
}

std::size_t Graph::index(const GraphNode* node) const {
  const auto found =
      std::find_if(nodes.begin(), nodes.end(), [&](const auto& n) { return n.get() == node; });
  return static_cast<std::size_t>(found - nodes.begin());
}

GraphExec::GraphExec(const Graph& graph) {
  for (const auto& n : graph.nodes) {
    Node node{n->work, {}, n->enabled, n.get()};
    for (const GraphNode* before : n->after) node.after.push_back(graph.index(before));
    nodes.push_back(std::move(node));
  }
}

bool GraphExec::update(const Graph& graph, std::size_t& differs) {
  GraphExec other(graph);
  const std::size_t n = std::min(nodes.size(), other.nodes.size());
  for (differs = 0; differs < n; ++differs) {
    const Node& a = nodes[differs];
    const Node& b = other.nodes[differs];
    // A kernel may change its parameters and sizes, and its function within a device.
    if (a.work.kind != b.work.kind || a.after != b.after || a.work.device != b.work.device) {
      return false;
    }
  }
  if (nodes.size() != other.nodes.size()) return false;
  for (std::size_t k = 0; k < n; ++k) nodes[k].work = std::move(other.nodes[k].work);
  return true;
}

std::vector<std::size_t> GraphExec::order(u64 seed) const {
  std::vector<std::size_t> order;
  std::vector<bool> done(nodes.size());
  std::mt19937_64 random(seed);
  while (order.size() < nodes.size()) {
    std::vector<std::size_t> ready;
    for (std::size_t k = 0; k < nodes.size(); ++k) {
      const bool can = !done[k] && std::all_of(nodes[k].after.begin(), nodes[k].after.end(),
                                               [&](std::size_t b) { return done[b]; });
      if (can) ready.push_back(k);
    }
    if (ready.empty()) fail("a graph's dependencies run in a circle");
    // The last one that can go goes first: what was captured early runs late.
    const std::size_t pick = seed == 0 ? ready.back() : ready[random() % ready.size()];
    done[pick] = true;
    order.push_back(pick);
  }
  return order;
}

}  // namespace cudasim
