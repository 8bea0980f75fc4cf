// Python module batchinfer._engine: the scheduler, with numpy arrays in and out. Types for editors: _engine.pyi.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "engine/scheduler.h"

namespace py = pybind11;
using namespace batchinfer;

namespace {

/// Any array or sequence of integers as int32; a TypeError for anything else, rather than rounding floats.
py::array_t<int32_t> as_int32(const py::object& values, const char* name) {
    const py::array any = py::array::ensure(values);
    if (!any || any.ndim() != 1 || (any.size() > 0 && any.dtype().kind() != 'i' && any.dtype().kind() != 'u')) {
        throw py::type_error(std::string(name) + ": expected a one-dimensional array of integers");
    }
    return py::array_t<int32_t, py::array::c_style | py::array::forcecast>::ensure(any);
}

std::span<const int32_t> view(const py::array_t<int32_t>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

template <typename T>
py::array_t<T> copy(std::span<const T> values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

/// A numpy view of a vector inside `owner`, which it keeps alive.
template <typename T>
py::array_t<T> expose(const std::vector<T>& values, const py::object& owner, std::vector<py::ssize_t> shape) {
    return py::array_t<T>(std::move(shape), values.data(), owner);
}

/// A property of Step that shows the valid part of one of its arrays: its first `count` + `more` entries.
template <typename T>
auto array_of(std::vector<T> Step::* array, int32_t Step::* count, int32_t more = 0) {
    return [=](const py::object& self) {
        const auto& step = self.cast<const Step&>();
        return expose(step.*array, self, {step.*count + more});
    };
}

template <typename T>
auto array_of(std::vector<T> Step::* array) {
    return [=](const py::object& self) {
        const auto& values = self.cast<const Step&>().*array;
        return expose(values, self, {static_cast<py::ssize_t>(values.size())});
    };
}

int64_t known(int64_t seq_id, bool found) {
    if (!found) throw py::key_error("no open sequence " + std::to_string(seq_id));
    return seq_id;
}

}  // namespace

PYBIND11_MODULE(_engine, module) {
    module.doc() =
        "Scheduler of the engine: which tokens of which sequences each step computes, and in which KV pages.";

    py::class_<Finished>(module, "Finished", "A sequence that ended by itself.")
        .def_readonly("seq_id", &Finished::seq_id)
        .def_property_readonly("reason",
                               [](const Finished& f) { return f.reason == FinishReason::kStop ? "stop" : "length"; })
        .def_property_readonly("tokens", [](const Finished& f) { return copy(std::span<const int32_t>(f.tokens)); })
        .def("__repr__", [](const Finished& f) {
            return "Finished(seq_id=" + std::to_string(f.seq_id) +
                   ", reason=" + (f.reason == FinishReason::kStop ? "'stop'" : "'length'") + ", " +
                   std::to_string(f.tokens.size()) + " tokens)";
        });

    py::class_<Step, std::shared_ptr<Step>>(module, "Step", "What the device computes in one step: flat arrays.")
        .def_readonly("index", &Step::index)
        .def_readonly("num_decode", &Step::num_decode)
        .def_readonly("num_tokens", &Step::num_tokens)
        .def_readonly("num_seqs", &Step::num_seqs)
        .def_readonly("num_samples", &Step::num_samples)
        .def_property_readonly("token_ids", array_of(&Step::token_ids, &Step::num_tokens))
        .def_property_readonly("positions", array_of(&Step::positions, &Step::num_tokens))
        .def_property_readonly("kv_index", array_of(&Step::kv_index, &Step::num_tokens))
        .def_property_readonly("q_start", array_of(&Step::q_start, &Step::num_seqs, 1))
        .def_property_readonly("kv_len", array_of(&Step::kv_len, &Step::num_seqs))
        .def_property_readonly("seq_slot", array_of(&Step::seq_slot, &Step::num_seqs))
        .def_property_readonly("seq_ids", array_of(&Step::seq_ids, &Step::num_seqs))
        .def_property_readonly("sample_row", array_of(&Step::sample_row, &Step::num_samples))
        .def_property_readonly("sample_slot", array_of(&Step::sample_slot, &Step::num_samples))
        .def_property_readonly("sample_seq", array_of(&Step::sample_seq, &Step::num_samples))
        .def_property_readonly("sample_count", array_of(&Step::sample_count, &Step::num_samples))
        .def_property_readonly("new_slots", array_of(&Step::new_slots))
        .def_property_readonly("new_seqs", array_of(&Step::new_seqs))
        .def_property_readonly("copy_source", array_of(&Step::copy_source))
        .def_property_readonly("copy_target", array_of(&Step::copy_target))
        .def_property_readonly("page_updates",
                               [](const py::object& self) {
                                   const auto& updates = self.cast<const Step&>().page_updates;
                                   return expose(updates, self, {static_cast<py::ssize_t>(updates.size() / 3), 3});
                               })
        .def_property_readonly("page_table", [](const py::object& self) {
            const PageTable& table = *self.cast<const Step&>().page_table;
            return expose(table.entries, self, {table.slots, table.columns});
        });

    py::class_<Scheduler>(module, "Scheduler", "Continuous batching over a paged KV cache with prefix reuse.")
        .def(py::init([](int32_t num_pages, int32_t page_size, int32_t max_slots, int32_t max_step_tokens,
                         int32_t max_seq_len, bool prefix_cache, int32_t lookup, int32_t hash_bits) {
                 return Scheduler({.num_pages = num_pages,
                                   .page_size = page_size,
                                   .max_slots = max_slots,
                                   .max_step_tokens = max_step_tokens,
                                   .max_seq_len = max_seq_len,
                                   .prefix_cache = prefix_cache,
                                   .lookup = lookup,
                                   .hash_bits = hash_bits});
             }),
             py::kw_only(), py::arg("num_pages"), py::arg("page_size"), py::arg("max_slots"),
             py::arg("max_step_tokens"), py::arg("max_seq_len"), py::arg("prefix_cache") = true, py::arg("lookup") = 0,
             py::arg("_hash_bits") = 64)
        .def(
            "add",
            [](Scheduler& self, int64_t seq_id, const py::object& prompt, int32_t max_new_tokens,
               int32_t min_new_tokens, int32_t expected_new_tokens, int32_t compute_from, int32_t family, bool lookup,
               const py::object& stop_token_ids, const py::object& generated) {
                const auto prompt_array = as_int32(prompt, "prompt");
                const auto stop_array = as_int32(stop_token_ids, "stop_token_ids");
                const auto generated_array = as_int32(generated, "generated");
                self.add({.id = seq_id,
                          .prompt = view(prompt_array),
                          .max_new_tokens = max_new_tokens,
                          .min_new_tokens = min_new_tokens,
                          .expected_new_tokens = expected_new_tokens,
                          .compute_from = compute_from,
                          .family = family,
                          .lookup = lookup,
                          .stop_token_ids = view(stop_array),
                          .generated = view(generated_array)});
            },
            py::arg("seq_id"), py::arg("prompt"), py::kw_only(), py::arg("max_new_tokens"),
            py::arg("min_new_tokens") = 0, py::arg("expected_new_tokens") = 0, py::arg("compute_from") = kComputeLast,
            py::arg("family") = 0, py::arg("lookup") = true, py::arg("stop_token_ids") = py::tuple(),
            py::arg("generated") = py::tuple())
        .def("limit_prompts", &Scheduler::limit_prompts, py::arg("step_tokens"))
        .def("forget_prefixes", &Scheduler::forget_prefixes)
        .def("tokens_left", [](const Scheduler& self) { return copy(std::span<const int64_t>(self.tokens_left())); })
        .def("schedule", [](Scheduler& self) { return std::const_pointer_cast<Step>(self.schedule()); })
        .def(
            "update",
            [](Scheduler& self, const py::object& tokens) { return self.update(view(as_int32(tokens, "tokens"))); },
            py::arg("tokens"))
        .def(
            "finish", [](Scheduler& self, int64_t seq_id) { known(seq_id, self.finish(seq_id)); }, py::arg("seq_id"))
        .def(
            "tokens",
            [](const Scheduler& self, int64_t seq_id) {
                return copy(self.tokens(known(seq_id, self.is_open(seq_id))));
            },
            py::arg("seq_id"))
        .def_property_readonly("num_waiting", &Scheduler::num_waiting)
        .def_property_readonly("num_running", &Scheduler::num_running)
        .def_property_readonly("num_open", &Scheduler::num_open)
        .def_property_readonly("num_steps_ahead", &Scheduler::num_steps_ahead)
        .def_property_readonly("max_steps_ahead", &Scheduler::max_steps_ahead)
        .def_property_readonly("pages_used", [](const Scheduler& self) { return self.pool().num_used(); })
        .def_property_readonly("pages_cached", [](const Scheduler& self) { return self.pool().num_cached(); })
        .def_property_readonly("pages_free", [](const Scheduler& self) { return self.pool().num_free(); })
        .def_property_readonly("preemptions", &Scheduler::preemptions)
        .def_property_readonly("cached_prompt_tokens", &Scheduler::cached_prompt_tokens)
        .def_property_readonly("drafted_tokens", &Scheduler::drafted_tokens)
        .def_property_readonly("accepted_tokens", &Scheduler::accepted_tokens)
        .def("check_integrity", &Scheduler::check_integrity);
}
