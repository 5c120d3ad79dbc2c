#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/products.h"

namespace moesaic::cuda {

/// How products are cut and which of them are taken.
struct ProductsOptions {
  std::int64_t block = 2048;  // rows and columns at most of a piece of A, B and C
  double least = 100;         // multiplications and additions per byte that goes there or back
};

/// Host matrices in, cuBLAS on GPU `device`, host matrix out, piece by piece: three pieces of 4 ·
/// block² bytes in device memory, three in pinned memory and a workspace of cuBLAS, all taken here,
/// nothing per product. Throws DeviceError.
std::unique_ptr<kernels::Products> make_products(int device, const ProductsOptions& options = {});

}  // namespace moesaic::cuda
