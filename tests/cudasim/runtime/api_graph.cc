#include <algorithm>
#include <cstring>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

namespace {

GraphNode* node_of(cudaGraphNode_t n) { return reinterpret_cast<GraphNode*>(n); }
cudaGraphNode_t handle(GraphNode* n) { return reinterpret_cast<cudaGraphNode_t>(n); }

std::vector<GraphNode*> nodes_of(const cudaGraphNode_t* list, std::size_t n) {
  std::vector<GraphNode*> nodes;
  for (std::size_t k = 0; k < n; ++k) nodes.push_back(node_of(list[k]));
  return nodes;
}

cudaError_t kernel_work(Runtime& r, const cudaKernelNodeParams& p, Work& work) {
  const Dim grid{p.gridDim.x, p.gridDim.y, p.gridDim.z};
  const Dim block{p.blockDim.x, p.blockDim.y, p.blockDim.z};
  return make_kernel_work(r, p.func, grid, block, p.kernelParams, p.sharedMemBytes, false, work);
}

cudaError_t instantiate(cudaGraphExec_t* exec, cudaGraph_t graph) {
  return call([&](Runtime&) {
    *exec = new CUgraphExec_st{std::make_shared<GraphExec>(*graph)};
    (*exec)->exec->order(0);  // refuses circles
    return cudaSuccess;
  });
}

GraphExec::Node* find(GraphExec& exec, const GraphNode* origin) {
  for (auto& n : exec.nodes) {
    if (n.origin == origin) return &n;
  }
  return nullptr;
}

}  // namespace

extern "C" {

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = new CUgraph_st{};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call([&](Runtime&) {
    delete graph;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* after, std::size_t n,
                                   const cudaKernelNodeParams* p) {
  return call([&](Runtime& r) {
    Work work;
    if (const cudaError_t e = kernel_work(r, *p, work)) return e;
    *node = handle(graph->add(std::move(work), nodes_of(after, n)));
    return cudaSuccess;
  });
}
cudaError_t cudaGraphAddEmptyNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                  const cudaGraphNode_t* after, std::size_t n) {
  return call([&](Runtime&) {
    *node = handle(graph->add({}, nodes_of(after, n)));
    return cudaSuccess;
  });
}
cudaError_t cudaGraphAddMemcpyNode1D(cudaGraphNode_t* node, cudaGraph_t graph,
                                     const cudaGraphNode_t* after, std::size_t n, void* to,
                                     const void* from, std::size_t bytes, cudaMemcpyKind) {
  return call([&](Runtime&) {
    Work work;
    work.kind = Work::Kind::Copy;
    work.device = thread_state().device;
    work.name = "memcpy node";
    work.copy = {reinterpret_cast<u64>(to), reinterpret_cast<u64>(from), bytes, 1, 0, 0};
    *node = handle(graph->add(std::move(work), nodes_of(after, n)));
    return cudaSuccess;
  });
}
cudaError_t cudaGraphAddMemsetNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* after, std::size_t n,
                                   const cudaMemsetParams* p) {
  return call([&](Runtime&) {
    Work work;
    work.kind = Work::Kind::Set;
    work.device = thread_state().device;
    work.name = "memset node";
    work.set = {
        reinterpret_cast<u64>(p->dst), p->width, p->height, p->pitch, p->value, p->elementSize};
    *node = handle(graph->add(std::move(work), nodes_of(after, n)));
    return cudaSuccess;
  });
}
cudaError_t cudaGraphAddHostNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                 const cudaGraphNode_t* after, std::size_t n,
                                 const cudaHostNodeParams* p) {
  return call([&](Runtime&) {
    Work work;
    work.kind = Work::Kind::Host;
    work.name = "host node";
    work.run = [f = p->fn, data = p->userData] { f(data); };
    *node = handle(graph->add(std::move(work), nodes_of(after, n)));
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* n) {
  return call([&](Runtime&) {
    const std::size_t count = graph->nodes.size();
    for (std::size_t k = 0; nodes != nullptr && k < std::min(*n, count); ++k) {
      nodes[k] = handle(graph->nodes[k].get());
    }
    if (nodes == nullptr || *n > count) *n = count;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  switch (node_of(node)->work.kind) {
    case Work::Kind::Kernel:
      *type = cudaGraphNodeTypeKernel;
      break;
    case Work::Kind::Copy:
      *type = cudaGraphNodeTypeMemcpy;
      break;
    case Work::Kind::Set:
      *type = cudaGraphNodeTypeMemset;
      break;
    case Work::Kind::Host:
      *type = cudaGraphNodeTypeHost;
      break;
    case Work::Kind::Library:
      *type = cudaGraphNodeTypeKernel;
      break;
    default:
      *type = cudaGraphNodeTypeEmpty;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphKernelNodeGetParams(cudaGraphNode_t node, cudaKernelNodeParams* p) {
  return call([&](Runtime& r) {
    const Work& w = node_of(node)->work;
    if (w.kind != Work::Kind::Kernel) return cudaErrorInvalidValue;
    *p = {};
    p->func = w.kernel.kernel;
    p->gridDim = {w.kernel.grid.x, w.kernel.grid.y, w.kernel.grid.z};
    p->blockDim = {w.kernel.block.x, w.kernel.block.y, w.kernel.block.z};
    p->sharedMemBytes = static_cast<unsigned>(w.kernel.dynamic_shared);
    // Pointers into the node's own copy, good until it is destroyed.
    thread_local std::vector<void*> pointers;
    pointers.clear();
    for (const auto& q : r.program(*w.kernel.kernel, w.device).parameters) {
      pointers.push_back(const_cast<std::byte*>(w.kernel.parameters.data()) + q.offset);
    }
    p->kernelParams = pointers.data();
    return cudaSuccess;
  });
}
cudaError_t cudaGraphKernelNodeSetParams(cudaGraphNode_t node, const cudaKernelNodeParams* p) {
  return call([&](Runtime& r) { return kernel_work(r, *p, node_of(node)->work); });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return instantiate(exec, graph);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  return instantiate(exec, graph);
}
cudaError_t cudaGraphInstantiateWithParams(cudaGraphExec_t* exec, cudaGraph_t graph,
                                           cudaGraphInstantiateParams* p) {
  p->result_out = cudaGraphInstantiateSuccess;
  return instantiate(exec, graph);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return call([&](Runtime&) {
    delete exec;  // launches that are pending keep the graph alive
    return cudaSuccess;
  });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return call([&](Runtime& r) {
    Stream* s = stream_of(r, stream);
    if (s == nullptr || exec == nullptr) return cudaErrorInvalidResourceHandle;
    // Launches of one executable graph follow each other, whatever their streams.
    Work work;
    work.kind = Work::Kind::Graph;
    work.device = s->device;
    work.name = "graph";
    // Later updates do not reach a launch that was made before them.
    work.graph = std::make_shared<GraphExec>(*exec->exec);
    return submit(r, stream, std::move(work));
  });
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* info) {
  return call([&](Runtime&) {
    std::size_t differs = 0;
    const bool ok = exec->exec->update(*graph, differs);
    if (info != nullptr) {
      *info = {};
      info->result = ok ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateErrorTopologyChanged;
      if (!ok && differs < graph->nodes.size())
        info->errorNode = handle(graph->nodes[differs].get());
    }
    return ok ? cudaSuccess : cudaErrorGraphExecUpdateFailure;
  });
}
cudaError_t cudaGraphExecKernelNodeSetParams(cudaGraphExec_t exec, cudaGraphNode_t node,
                                             const cudaKernelNodeParams* p) {
  return call([&](Runtime& r) {
    GraphExec::Node* n = find(*exec->exec, node_of(node));
    if (n == nullptr || n->work.kind != Work::Kind::Kernel) return cudaErrorInvalidValue;
    return kernel_work(r, *p, n->work);
  });
}
cudaError_t cudaGraphExecMemcpyNodeSetParams1D(cudaGraphExec_t exec, cudaGraphNode_t node, void* to,
                                               const void* from, std::size_t bytes,
                                               cudaMemcpyKind) {
  return call([&](Runtime&) {
    GraphExec::Node* n = find(*exec->exec, node_of(node));
    if (n == nullptr || n->work.kind != Work::Kind::Copy) return cudaErrorInvalidValue;
    n->work.copy = {reinterpret_cast<u64>(to), reinterpret_cast<u64>(from), bytes, 1, 0, 0};
    return cudaSuccess;
  });
}
cudaError_t cudaGraphNodeSetEnabled(cudaGraphExec_t exec, cudaGraphNode_t node, unsigned enabled) {
  return call([&](Runtime&) {
    GraphExec::Node* n = find(*exec->exec, node_of(node));
    if (n == nullptr) return cudaErrorInvalidValue;
    n->enabled = enabled != 0;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char* path, unsigned) {
  return call([&](Runtime&) {
    std::FILE* f = std::fopen(path, "w");
    if (f == nullptr) return cudaErrorOperatingSystem;
    std::fputs("digraph graph_0 {\n", f);
    for (std::size_t k = 0; k < graph->nodes.size(); ++k) {
      const auto& n = *graph->nodes[k];
      std::fprintf(f, "  n%zu [label=\"%s\"];\n", k, n.work.name.c_str());
      for (const auto* b : n.after) std::fprintf(f, "  n%zu -> n%zu;\n", graph->index(b), k);
    }
    std::fputs("}\n", f);
    std::fclose(f);
    return cudaSuccess;
  });
}

}  // extern "C"
