#include "kernels/embedding.h"

#include "kernels/base/error.h"
#include "kernels/cpu/row_split.h"
#include "kernels/quant.h"

namespace moesaic::kernels {

void embed(Context& ctx, const WeightView& table, std::span<const std::int32_t> ids, float scale,
           Matrix x) {
  const auto n_tokens = static_cast<std::int64_t>(ids.size());
  require<ShapeError>(x.rows == n_tokens && x.cols == table.cols,
                      "embedding: output is [{}, {}], expected [{}, {}]", x.rows, x.cols, n_tokens,
                      table.cols);
  for (const std::int32_t id : ids) {
    require<InputError>(id >= 0 && id < table.rows,
                        "embedding: token id {} is outside the vocabulary of {} tokens", id,
                        table.rows);
  }
  for_rows(ctx, n_tokens, table.cols, [&](Range rows, int) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const std::span<float> row(x.row(t), static_cast<std::size_t>(x.cols));
      dequantize_row(table.dtype, table.row(ids[static_cast<std::size_t>(t)]), row);
      if (scale == 1.0f) continue;
      for (float& value : row) value *= scale;
    }
    ctx.tally.add(Traffic::Embedding, rows.size() * table.row_bytes());
  });
}

}  // namespace moesaic::kernels
