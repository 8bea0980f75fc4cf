# _gpu: the ops for Intel GPUs, the same module as for NVIDIA's, with the launchers of csrc/sycl in place of csrc/gpu's.
#
# icpx compiles everything: a project has one C++ compiler. Found through CXX where that names an icpx (conda sets it to its
# gcc, too), CMPLR_ROOT (which oneAPI's modules and setvars.sh set), ONEAPI_ROOT or PATH. The kernels travel as SPIR-V, from which the GPU's driver makes its code.

# The compiler to use, or an empty string.
function(batchinfer_find_icpx out)
  set(names ${CMAKE_CXX_COMPILER} $ENV{CXX})
  list(FILTER names INCLUDE REGEX "icpx[^/]*$")
  find_program(icpx NAMES ${names} icpx NO_CACHE NO_CMAKE_SYSTEM_PATH
               HINTS "$ENV{CMPLR_ROOT}/bin" "$ENV{ONEAPI_ROOT}/compiler/latest/bin")
  if(NOT icpx)
    set(icpx "")
  endif()
  set(${out} "${icpx}" PARENT_SCOPE)
endfunction()

# Sets CMAKE_CXX_COMPILER; to be called before the language is enabled.
function(batchinfer_use_icpx)
  batchinfer_find_icpx(icpx)
  if(NOT icpx)
    message(FATAL_ERROR "BATCHINFER_DEVICE=xpu: there is no icpx in CXX, CMPLR_ROOT/bin, ONEAPI_ROOT/compiler/latest/bin or "
                        "PATH. Load oneAPI 2024.2 or newer (module load intel/oneapi, or source setvars.sh), or build "
                        "for the CPU: BATCHINFER_DEVICE=cpu pip install .")
  endif()
  execute_process(COMMAND "${icpx}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(NOT version MATCHES "DPC\\+\\+.* Compiler ([0-9.]+)")
    message(FATAL_ERROR "BATCHINFER_DEVICE=xpu: ${icpx} is not Intel's icpx (its --version does not say so)")
  endif()
  if(CMAKE_MATCH_1 VERSION_LESS 2024.2)
    message(FATAL_ERROR "BATCHINFER_DEVICE=xpu: ${icpx} is of oneAPI ${CMAKE_MATCH_1}; wanted: 2024.2 or newer")
  endif()
  message(STATUS "batchinfer: ${icpx}, oneAPI ${CMAKE_MATCH_1}")
  # icpx alone supposes that there is no NaN, and that sums may be reordered.
  add_compile_options(-fp-model=precise)
  set(CMAKE_CXX_COMPILER "${icpx}" CACHE FILEPATH "As batchinfer found it" FORCE)
  set(BATCHINFER_ICPX_VERSION "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# -ffp-contract=off: the sampler's arithmetic, see csrc/sycl/sample.h.
function(batchinfer_add_sycl)
  file(GLOB sources CONFIGURE_DEPENDS csrc/sycl/*.cpp)
  pybind11_add_module(_gpu csrc/bindings/gpu.cpp ${sources})
  target_include_directories(_gpu PRIVATE csrc csrc/include)
  target_compile_options(_gpu PRIVATE -fsycl -ffp-contract=off -Wall)
  target_link_options(_gpu PRIVATE -fsycl)
  target_compile_definitions(_gpu PRIVATE BATCHINFER_GPU_VENDOR="xpu" BATCHINFER_GPU_ARCHITECTURES="spir64"
                             BATCHINFER_GPU_TOOLKIT="${BATCHINFER_ICPX_VERSION}")
  install(TARGETS _gpu LIBRARY DESTINATION batchinfer)
endfunction()
