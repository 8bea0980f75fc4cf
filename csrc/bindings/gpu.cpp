// Python's view of the GPU ops: addresses, sizes and the stream as integers, so that no torch header is needed and one
// build works with every torch. batchinfer/ops/gpu.py checks the tensors; no call waits for the device.
#include <pybind11/pybind11.h>

#include "gpu/ops.h"

namespace py = pybind11;
using namespace batchinfer;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

gpu::Stream stream_at(uintptr_t handle) {
    return reinterpret_cast<gpu::Stream>(handle);
}

void bind_rows(py::module_& m) {
    m.def("lookup", [](uintptr_t ids, uintptr_t table, uintptr_t out, int dtype, int64_t rows, int64_t width,
                       int64_t table_rows, float scale, uintptr_t stream) {
        gpu::lookup(
            {at<int32_t>(ids), at<void>(table), at<void>(out), gpu::GpuDtype(dtype), rows, width, table_rows, scale},
            stream_at(stream));
    });
    m.def("rms_norm", [](uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int dtype, int64_t tokens,
                         int64_t width, float eps, uintptr_t stream) {
        gpu::rms_norm({at<void>(x), at<float>(weight), at<void>(residual), at<void>(out), gpu::GpuDtype(dtype), tokens,
                       width, eps},
                      stream_at(stream));
    });
    m.def("silu_mul", [](uintptr_t gate_up, uintptr_t out, int dtype, int64_t tokens, int64_t width, uintptr_t stream) {
        gpu::silu_mul({at<void>(gate_up), at<void>(out), gpu::GpuDtype(dtype), tokens, width}, stream_at(stream));
    });
    m.def("gelu_mul", [](uintptr_t gate_up, uintptr_t out, int dtype, int64_t tokens, int64_t width, uintptr_t stream) {
        gpu::gelu_mul({at<void>(gate_up), at<void>(out), gpu::GpuDtype(dtype), tokens, width}, stream_at(stream));
    });
    m.def("gated_linear", [](uintptr_t x, uintptr_t weight, uintptr_t out, int dtype, int64_t rows, int64_t width,
                             int64_t depth, uintptr_t stream) {
        return gpu::gated_linear(
            {at<void>(x), at<void>(weight), at<void>(out), gpu::GpuDtype(dtype), rows, width, depth},
            stream_at(stream));
    });
    m.def("rope_and_cache",
          [](uintptr_t qkv, uintptr_t positions, uintptr_t kv_index, uintptr_t cos_sin, uintptr_t q_norm,
             uintptr_t k_norm, uintptr_t k_cache, uintptr_t v_cache, uintptr_t q_out, int dtype, int cache_dtype,
             int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_width, int64_t max_positions,
             int64_t rotary_width, int64_t pages, int64_t page_size, float norm_eps, uintptr_t stream) {
              gpu::rope_and_cache({at<void>(qkv),
                                   at<int32_t>(positions),
                                   at<int64_t>(kv_index),
                                   at<float>(cos_sin),
                                   at<float>(q_norm),
                                   at<float>(k_norm),
                                   at<void>(k_cache),
                                   at<void>(v_cache),
                                   at<void>(q_out),
                                   gpu::GpuDtype(dtype),
                                   gpu::GpuDtype(cache_dtype),
                                   tokens,
                                   heads,
                                   kv_heads,
                                   head_width,
                                   max_positions,
                                   rotary_width,
                                   pages,
                                   page_size,
                                   norm_eps},
                                  stream_at(stream));
          });
    m.def("copy_pages", [](uintptr_t k_cache, uintptr_t v_cache, uintptr_t source, uintptr_t target, int64_t copies,
                           int64_t pages, int64_t page_bytes, uintptr_t stream) {
        gpu::copy_pages(
            {at<void>(k_cache), at<void>(v_cache), at<int32_t>(source), at<int32_t>(target), copies, pages, page_bytes},
            stream_at(stream));
    });
}

void bind_steps(py::module_& m) {
    m.def("feed_back", [](uintptr_t ids, uintptr_t kv_len, uintptr_t slot, uintptr_t last_token, uintptr_t stop_ids,
                          int64_t rows, int64_t slots, int64_t stops, uintptr_t stream) {
        gpu::feed_back({at<int32_t>(ids), at<int32_t>(kv_len), at<int32_t>(slot), at<int32_t>(last_token),
                        at<int32_t>(stop_ids), rows, slots, stops},
                       stream_at(stream));
    });
}

void bind_attention(py::module_& m) {
    py::class_<gpu::AttentionPlan>(m, "AttentionPlan",
                                   "Addresses of a step's work lists; the tensors are the caller's.")
        .def(py::init([](uintptr_t q_start, uintptr_t kv_len, uintptr_t slot, uintptr_t page_table, int sequences,
                         int slots, int slot_pages, int heads, int kv_heads, int head_width, int pages, int page_size,
                         int split, bool decode_only, int window, uintptr_t decode_start, uintptr_t prefill_start,
                         uintptr_t partial_start, uintptr_t shared, uintptr_t parts, uintptr_t short_parts,
                         uintptr_t part_counts, uintptr_t queues, uintptr_t arrivals, uintptr_t partial_out,
                         uintptr_t partial_lse) {
            return gpu::AttentionPlan{at<int32_t>(q_start),
                                      at<int32_t>(kv_len),
                                      at<int32_t>(slot),
                                      at<int32_t>(page_table),
                                      sequences,
                                      slots,
                                      slot_pages,
                                      heads,
                                      kv_heads,
                                      head_width,
                                      pages,
                                      page_size,
                                      split,
                                      decode_only,
                                      window,
                                      at<int32_t>(decode_start),
                                      at<int32_t>(prefill_start),
                                      at<int32_t>(partial_start),
                                      at<int32_t>(shared),
                                      at<gpu::DecodePart>(parts),
                                      at<gpu::DecodePart>(short_parts),
                                      at<int32_t>(part_counts),
                                      at<int32_t>(queues),
                                      at<int32_t>(arrivals),
                                      at<float>(partial_out),
                                      at<float>(partial_lse)};
        }));
    m.def("plan_attention",
          [](const gpu::AttentionPlan& plan, uintptr_t stream) { gpu::plan_attention(plan, stream_at(stream)); });
    m.def("attention",
          [](const gpu::AttentionPlan& plan, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t out,
             uintptr_t lse, int dtype, int cache_dtype, int tokens, float scale, float softcap, uintptr_t stream) {
              gpu::attention({plan, at<void>(q), at<void>(k_cache), at<void>(v_cache), at<void>(out), at<float>(lse),
                              gpu::GpuDtype(dtype), gpu::GpuDtype(cache_dtype), tokens, scale, softcap},
                             stream_at(stream));
          });
}

void bind_sample(py::module_& m) {
    // Order of the arguments: SampleArgs, then the logits before penalties, then the stream.
    m.def("sample", [](uintptr_t logits, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_k,
                       uintptr_t top_p, uintptr_t min_p, uintptr_t seed, uintptr_t position, uintptr_t repetition,
                       uintptr_t presence, uintptr_t frequency, uintptr_t history_ids, uintptr_t history_start,
                       uintptr_t history_prompt, int64_t history_size, uintptr_t banned_ids, uintptr_t banned_start,
                       int64_t banned_size, uintptr_t tokens, uintptr_t num_logprobs, uintptr_t chosen,
                       uintptr_t top_ids, uintptr_t top, int64_t top_width, uintptr_t raw, uintptr_t stream) {
        SampleArgs a{};
        a.logits = at<float>(logits), a.rows = rows, a.vocab = vocab;
        a.temperature = at<float>(temperature), a.top_k = at<int32_t>(top_k), a.top_p = at<float>(top_p);
        a.min_p = at<float>(min_p), a.seed = at<int64_t>(seed), a.position = at<int32_t>(position);
        a.repetition = at<float>(repetition), a.presence = at<float>(presence), a.frequency = at<float>(frequency);
        a.history_ids = at<int32_t>(history_ids), a.history_start = at<int32_t>(history_start);
        a.history_prompt = at<int32_t>(history_prompt), a.history_size = history_size;
        a.banned_ids = at<int32_t>(banned_ids), a.banned_start = at<int32_t>(banned_start), a.banned_size = banned_size;
        a.tokens = at<int32_t>(tokens), a.num_logprobs = at<int32_t>(num_logprobs), a.chosen = at<float>(chosen);
        a.top_ids = at<int32_t>(top_ids), a.top = at<float>(top), a.top_width = top_width;
        gpu::penalise(a, stream_at(stream));
        gpu::choose(a, stream_at(stream));
        gpu::logprobs(a, at<float>(raw), stream_at(stream));
    });
}

// What compiled the kernels, and for which architectures, as CMake names them.
py::dict build_info() {
    py::dict info;
#ifdef BATCHINFER_GPU_TOOLKIT
    info["toolkit"] = BATCHINFER_GPU_TOOLKIT;
    info["architectures"] = py::str(BATCHINFER_GPU_ARCHITECTURES).attr("split")();
#else
    info["toolkit"] = "";
    info["architectures"] = py::list();
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_gpu, m) {
    m.doc() = "Compiled GPU ops; batchinfer.ops.gpu is the door.";
    m.attr("compiled_for") = BATCHINFER_GPU_VENDOR;
    m.attr("build_info") = build_info();
    m.def("device_count", &gpu::device_count, "Devices that the driver shows; 0 without a driver.");
    bind_rows(m);
    bind_steps(m);
    bind_attention(m);
    bind_sample(m);
}
