#pragma once

#include <memory>
#include <vector>

#include "tests/cudasim/runtime/work.h"

namespace cudasim {

struct GraphNode {
  Work work;
  std::vector<GraphNode*> after;  // what it depends on
  bool enabled = true;
};

struct Graph {
  std::vector<std::unique_ptr<GraphNode>> nodes;  // a node comes after what it depends on

  GraphNode* add(Work work, std::vector<GraphNode*> after);
  /// Index of a node of this graph; nodes.size() for another's.
  std::size_t index(const GraphNode* node) const;
};

/// A graph that can be launched: a copy, fixed but for its nodes' parameters.
struct GraphExec {
  struct Node {
    Work work;
    std::vector<std::size_t> after;
    bool enabled = true;
    const GraphNode* origin = nullptr;  // as cudaGraphExecKernelNodeSetParams names it
  };
  std::vector<Node> nodes;

  explicit GraphExec(const Graph& graph);
  /// Takes over the parameters of a graph of the same shape. False, with the index of the first
  /// node that differs, if it has another shape.
  bool update(const Graph& graph, std::size_t& differs);
  /// All nodes in an order that their dependencies allow: seed 0 as late as possible for the first
  /// ones, others mixed.
  std::vector<std::size_t> order(u64 seed) const;
};

}  // namespace cudasim
