// Python's view of the ops: addresses and sizes as integers, so that no torch header is needed and one build works with
// every torch. batchinfer/ops/native.py checks the tensors; every op releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/attention.h"
#include "cpu/backend.h"
#include "cpu/gemm.h"
#include "cpu/shared_memory.h"

namespace py = pybind11;
using namespace batchinfer;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Binds f(Cpu&, ...) as a method that runs without the GIL.
template <class F>
void def_op(py::class_<Cpu>& cls, const char* name, F f) {
    cls.def(name, f, py::call_guard<py::gil_scoped_release>());
}

// The same of an op of a step, which goes into the program that is being recorded too.
template <class... A>
void def_step_op(py::class_<Cpu>& cls, const char* name, void (*f)(Cpu&, A...)) {
    def_op(cls, name, [f](Cpu& cpu, A... arguments) {
        f(cpu, arguments...);
        if (cpu.recording) {
            const std::tuple<Cpu&, A...> all(cpu, arguments...);  // of weights and plans the addresses
            cpu.recording->add([f, all] { std::apply(f, all); });
        }
    });
}

void bind_elementwise(py::class_<Cpu>& cls) {
    def_step_op(
        cls, "embed",
        +[](Cpu& cpu, uintptr_t ids, uintptr_t table, int table_dtype, uintptr_t out, int64_t tokens, int64_t width,
            int64_t vocab, float scale) {
            embed(cpu,
                  {at<int32_t>(ids), at<void>(table), Dtype(table_dtype), at<float>(out), tokens, width, vocab, scale});
        });
    def_step_op(
        cls, "rms_norm",
        +[](Cpu& cpu, uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int out_dtype, int64_t tokens,
            int64_t width, float eps) {
            rms_norm(cpu, {at<float>(x), at<float>(weight), at<float>(residual), at<void>(out), Dtype(out_dtype),
                           tokens, width, eps});
        });
    def_step_op(
        cls, "layer_norm",
        +[](Cpu& cpu, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out, int out_dtype,
            int64_t tokens, int64_t width, float eps) {
            layer_norm(cpu, {at<float>(x), at<float>(weight), at<float>(bias), at<float>(residual), at<void>(out),
                             Dtype(out_dtype), tokens, width, eps});
        });
    def_step_op(
        cls, "add", +[](Cpu& cpu, uintptr_t x, uintptr_t residual, int64_t tokens, int64_t width) {
            add(cpu, {at<float>(x), at<float>(residual), tokens, width});
        });
    def_step_op(
        cls, "softcap", +[](Cpu& cpu, uintptr_t x, int64_t rows, int64_t width, float cap) {
            softcap(cpu, {at<float>(x), rows, width, cap});
        });
    def_step_op(
        cls, "rope_and_cache",
        +[](Cpu& cpu, uintptr_t qkv, uintptr_t positions, uintptr_t kv_index, uintptr_t cos_sin, uintptr_t q_norm,
            uintptr_t k_norm, uintptr_t k_cache, uintptr_t v_cache, int cache_dtype, uintptr_t q_out, int64_t tokens,
            int64_t heads, int64_t kv_heads, int64_t head_width, int64_t max_positions, int64_t rotary_width,
            int64_t pages, int64_t page_size, float norm_eps, bool norm_all) {
            rope_and_cache(cpu, {at<float>(qkv),
                                 at<int32_t>(positions),
                                 at<int64_t>(kv_index),
                                 at<float>(cos_sin),
                                 at<float>(q_norm),
                                 at<float>(k_norm),
                                 at<void>(k_cache),
                                 at<void>(v_cache),
                                 Dtype(cache_dtype),
                                 at<float>(q_out),
                                 tokens,
                                 heads,
                                 kv_heads,
                                 head_width,
                                 max_positions,
                                 rotary_width,
                                 pages,
                                 page_size,
                                 norm_eps,
                                 norm_all});
        });
    def_step_op(
        cls, "silu_mul", +[](Cpu& cpu, uintptr_t gate_up, uintptr_t out, int out_dtype, int64_t tokens, int64_t width) {
            silu_mul(cpu, {at<float>(gate_up), at<void>(out), Dtype(out_dtype), tokens, width});
        });
    def_step_op(
        cls, "gelu_mul", +[](Cpu& cpu, uintptr_t gate_up, uintptr_t out, int out_dtype, int64_t tokens, int64_t width) {
            gelu_mul(cpu, {at<float>(gate_up), at<void>(out), Dtype(out_dtype), tokens, width});
        });
    def_step_op(
        cls, "activate",
        +[](Cpu& cpu, int kind, uintptr_t x, uintptr_t out, int out_dtype, int64_t tokens, int64_t width) {
            activate(cpu, {Activation(kind), at<float>(x), at<void>(out), Dtype(out_dtype), tokens, width});
        });
    def_step_op(
        cls, "gather_rows",
        +[](Cpu& cpu, uintptr_t x, uintptr_t index, uintptr_t out, int dtype, int64_t x_rows, int64_t rows,
            int64_t width) {
            gather_rows(cpu, {at<void>(x), at<int32_t>(index), at<void>(out), Dtype(dtype), x_rows, rows, width});
        });
    def_step_op(
        cls, "copy_pages",
        +[](Cpu& cpu, uintptr_t k_cache, uintptr_t v_cache, uintptr_t source, uintptr_t target, int64_t copies,
            int64_t pages, int64_t page_bytes) {
            copy_pages(cpu, {at<void>(k_cache), at<void>(v_cache), at<int32_t>(source), at<int32_t>(target), copies,
                             pages, page_bytes});
        });
}

void bind_linear(py::module_& m, py::class_<Cpu>& cls) {
    py::class_<PackedWeight>(m, "PackedWeight")
        .def_property_readonly("outputs", &PackedWeight::outputs)
        .def_property_readonly("depth", &PackedWeight::depth)
        .def_property_readonly("gated", &PackedWeight::gated)
        .def_property_readonly("bytes", &PackedWeight::bytes);
    py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(m, "SharedMemory", py::buffer_protocol())
        .def_buffer([](SharedMemory& memory) {
            // Never said to be read-only, of which torch would warn.
            return py::buffer_info(reinterpret_cast<uint8_t*>(memory.data()), memory.bytes());
        });
    def_op(cls, "map_shared", [](Cpu&, int fd, size_t bytes, bool writable) {
        return std::make_shared<SharedMemory>(fd, bytes, writable);
    });
    def_op(cls, "populate", [](Cpu& cpu, SharedMemory& memory, size_t end) { memory.populate(end, cpu.pool); });
    // A weight that is packed in `memory` from byte `offset` on, or (with null) is to be packed in new memory.
    const auto weight_in = [](Cpu& cpu, int format, int64_t outputs, int64_t depth, bool gated,
                              const std::shared_ptr<SharedMemory>& memory, size_t offset) {
        return std::make_unique<PackedWeight>(*cpu.kernels.gemm[format], outputs, depth, gated,
                                              memory ? SharedMemory::part(memory, offset) : nullptr);
    };
    def_op(cls, "packed_weight", weight_in);
    def_op(cls, "pack_weight",
           [weight_in](Cpu& cpu, uintptr_t values, uintptr_t scales, uintptr_t minima, int format, int64_t outputs,
                       int64_t depth, bool gated, const std::shared_ptr<SharedMemory>& memory, size_t offset) {
               auto packed = weight_in(cpu, format, outputs, depth, gated, memory, offset);
               packed->pack({at<void>(values), at<void>(scales), at<void>(minima)}, cpu.pool);
               return packed;
           });
    def_op(cls, "packed_bytes", [](Cpu& cpu, int format, int64_t outputs, int64_t depth, bool gated) {
        return PackedWeight::bytes_of(*cpu.kernels.gemm[format], outputs, depth, gated);
    });
    def_step_op(
        cls, "linear",
        +[](Cpu& cpu, uintptr_t x, int x_dtype, const PackedWeight& weight, uintptr_t bias, uintptr_t out,
            int out_dtype, int64_t rows) {
            weight.multiply(Dtype(x_dtype), at<void>(x), rows, at<float>(bias), Dtype(out_dtype), at<void>(out),
                            cpu.pool);
        });
}

void bind_attention(py::module_& m, py::class_<Cpu>& cls) {
    py::class_<AttentionPlan>(m, "AttentionPlan")
        .def_property_readonly("tokens", &AttentionPlan::tokens)
        .def_property_readonly("num_items", &AttentionPlan::num_items)
        .def_property_readonly("query_shape",
                               [](const AttentionPlan& plan) {
                                   const AttentionPlanArgs& a = plan.shape();
                                   return py::make_tuple(plan.tokens(), a.heads, a.head_width);
                               })
        .def_property_readonly("cache_shape", [](const AttentionPlan& plan) {
            const AttentionPlanArgs& a = plan.shape();
            return py::make_tuple(a.pages, a.kv_heads, a.page_size, a.head_width);
        });
    def_op(cls, "plan_attention",
           [](Cpu& cpu, AttentionPlan* again, uintptr_t q_start, uintptr_t kv_len, uintptr_t slot, uintptr_t page_table,
              int64_t sequences, int64_t slots, int64_t slot_pages, int64_t heads, int64_t kv_heads, int64_t head_width,
              int64_t pages, int64_t page_size, int64_t window) -> std::unique_ptr<AttentionPlan> {
               const AttentionPlanArgs args = {at<int32_t>(q_start),
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
                                               window};
               if (!again) return std::make_unique<AttentionPlan>(args, *cpu.kernels.attention, cpu.pool.size());
               again->make(args, cpu.pool.size());
               return nullptr;
           });
    def_step_op(
        cls, "attention",
        +[](Cpu& cpu, AttentionPlan& plan, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, int cache_dtype,
            float scale, float softcap, uintptr_t out, int out_dtype, uintptr_t lse) {
            const AttentionPlanArgs& a = plan.shape();
            plan.run({at<float>(q), at<void>(k_cache), at<void>(v_cache), Dtype(cache_dtype), at<void>(out),
                      Dtype(out_dtype), at<float>(lse), a.heads, a.kv_heads, a.head_width, a.page_size, a.window, scale,
                      softcap},
                     *cpu.kernels.attention, cpu.pool);
        });
}

void bind_program(py::module_& m, py::class_<Cpu>& cls) {
    py::class_<Program>(m, "Program").def(py::init<>()).def("__len__", &Program::size);
    cls.def("record", [](Cpu& cpu, Program* program) { cpu.recording = program; });
    def_op(cls, "replay", [](Cpu&, const Program& program) { program.run(); });
}

void bind_sample(py::class_<Cpu>& cls) {
    def_op(cls, "sample",
           [](Cpu& cpu, uintptr_t logits, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_k,
              uintptr_t top_p, uintptr_t min_p, uintptr_t seed, uintptr_t position, uintptr_t repetition,
              uintptr_t presence, uintptr_t frequency, uintptr_t history_ids, uintptr_t history_start,
              uintptr_t history_prompt, int64_t history_size, uintptr_t bias_ids, uintptr_t bias_start,
              uintptr_t bias_values, int64_t bias_size, uintptr_t banned_ids, uintptr_t banned_start,
              int64_t banned_size, uintptr_t allowed, uintptr_t tokens, uintptr_t num_logprobs, uintptr_t chosen,
              uintptr_t top_ids, uintptr_t top, int64_t top_width) {
               sample(cpu, {at<float>(logits),
                            rows,
                            vocab,
                            at<float>(temperature),
                            at<int32_t>(top_k),
                            at<float>(top_p),
                            at<float>(min_p),
                            at<int64_t>(seed),
                            at<int32_t>(position),
                            at<float>(repetition),
                            at<float>(presence),
                            at<float>(frequency),
                            at<int32_t>(history_ids),
                            at<int32_t>(history_start),
                            at<int32_t>(history_prompt),
                            history_size,
                            at<int32_t>(bias_ids),
                            at<int32_t>(bias_start),
                            at<float>(bias_values),
                            bias_size,
                            at<int32_t>(banned_ids),
                            at<int32_t>(banned_start),
                            banned_size,
                            at<uint32_t>(allowed),
                            at<int32_t>(tokens),
                            at<int32_t>(num_logprobs),
                            at<float>(chosen),
                            at<int32_t>(top_ids),
                            at<float>(top),
                            top_width});
           });
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["isas"] = py::tuple(py::cast(compiled_isas()));
    info["usable_isas"] = py::tuple(py::cast(usable_isas()));
    return info;
}

}  // namespace

PYBIND11_MODULE(_ops, m) {
    m.doc() = "Compiled ops; batchinfer.ops.native is the door.";
    m.attr("compiled_for") = py::make_tuple("cpu");
    m.attr("build_info") = build_info();

    py::class_<Cpu> cls(m, "Cpu");
    cls.def(py::init<int, const std::string&>(), py::arg("threads") = 0, py::arg("isa") = "");
    cls.def_property_readonly("isa", [](const Cpu& cpu) { return cpu.kernels.isa; });
    cls.def_property_readonly("bf16_dot", [](const Cpu& cpu) { return cpu.kernels.bf16_dot; });
    cls.def_property_readonly("threads", [](const Cpu& cpu) { return cpu.pool.size(); });
    bind_elementwise(cls);
    bind_sample(cls);
    bind_linear(m, cls);
    bind_attention(m, cls);
    bind_program(m, cls);
}
