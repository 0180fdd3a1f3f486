// Exact softmax attention of one or few queries over keys that lie in a row, or are listed.

#include "abi.hpp"
#include "float_source.hpp"

FOVEATE_EXPORT int32_t foveate_decode(const foveate::DecodeCall* call, int64_t size) {
  using namespace foveate;
  return guarded(call, size, [](const DecodeCall& call) {
    const Queries& c = call.queries;
    const bool listed = call.lists != nullptr;
    const int32_t lanes = listed && call.list_heads > 1 ? call.list_heads : c.kv_heads;
    const int64_t keys = listed ? int64_t{call.entries} * call.width : c.k_len;
    const Grid grid(c, lanes, listed ? call.list_rows : 1, keys);
    return decode_all(c, grid, [&] { return FloatSource(call); });
  });
}
