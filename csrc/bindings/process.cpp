// Python module batchinfer._process: what to do where a library ends the process, or does not come back. Types for
// editors: _process.pyi.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

std::vector<std::string> command;
std::vector<char*> arguments;
std::atomic<bool> armed = false;

/// On any thread, whoever holds the interpreter's lock: nothing of Python is touched.
void start_over(const char* reason) {
    if (!armed.exchange(false)) return;
    dprintf(STDERR_FILENO, "batchinfer: %s: process %d starts again\n", reason, getpid());
    std::signal(SIGUSR1, SIG_IGN);  // the program that comes has no handler yet, and would die of it
    execv(arguments[0], arguments.data());
}

void restart_at_exit(std::vector<std::string> argv) {
    if (argv.empty()) throw pybind11::value_error("restart_at_exit: an empty command");
    static const bool registered = std::atexit([] { start_over("a library ends the process"); }) == 0;
    armed = false;
    command = std::move(argv);
    arguments.clear();
    for (std::string& argument : command)
        arguments.push_back(argument.data());
    arguments.push_back(nullptr);
    armed = registered;
}

}  // namespace

PYBIND11_MODULE(_process, module) {
    module.doc() = "What to do where a library ends the process, or does not come back.";
    module.def("restart_at_exit", &restart_at_exit, pybind11::arg("argv"));
    module.def("restart", [](const std::string& reason) { start_over(reason.c_str()); }, pybind11::arg("reason"));
    module.def("end_at_exit", [] { armed = false; });
}
