# One function per part of the extension; a new backend is one more function and one more folder under csrc/.

# Which device to build for: what -DBATCHINFER_DEVICE or the environment asks for, else cuda where a CUDA compiler is
# found, else cpu. What was chosen, and why, is one line of the configure log.
function(batchinfer_choose_device out)
  set(known cpu cuda rocm xpu none)
  set(device "${BATCHINFER_DEVICE}")
  set(reason "as asked for")
  if(NOT device AND DEFINED ENV{BATCHINFER_DEVICE})
    set(device "$ENV{BATCHINFER_DEVICE}")
  endif()
  if(NOT device)
    batchinfer_find_nvcc(nvcc)
    if(nvcc)
      set(device cuda)
      set(reason "BATCHINFER_DEVICE is not set, and there is ${nvcc}")
    else()
      set(device cpu)
      set(reason "BATCHINFER_DEVICE is not set, and no CUDA compiler is in CUDACXX, CUDA_HOME/bin or PATH")
    endif()
  endif()
  if(NOT device IN_LIST known)
    message(FATAL_ERROR "BATCHINFER_DEVICE=${device} is not one of: ${known}")
  endif()
  message(STATUS "batchinfer: device ${device} (${reason})")
  set(${out} "${device}" PARENT_SCOPE)
endfunction()

# The CUDA compiler that enable_language(CUDA) will take, or an empty string.
function(batchinfer_find_nvcc out)
  find_program(nvcc NAMES $ENV{CUDACXX} nvcc HINTS "$ENV{CUDA_HOME}/bin" NO_CACHE NO_CMAKE_SYSTEM_PATH)
  if(NOT nvcc)
    set(nvcc "")
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

function(batchinfer_use_compiler_cache)
  find_program(cache NAMES ccache sccache)
  if(cache AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CXX_COMPILER_LAUNCHER "${cache}" PARENT_SCOPE)
    message(STATUS "batchinfer: compiler cache ${cache}")
  endif()
endfunction()

# As many compilers at once as MAX_JOBS says (ninja; without it one per core): a login node has many cores, and little
# memory for each user.
function(batchinfer_limit_jobs)
  if("$ENV{MAX_JOBS}" MATCHES "^[1-9][0-9]*$")
    set_property(GLOBAL PROPERTY JOB_POOLS compile=$ENV{MAX_JOBS})
    set(CMAKE_JOB_POOL_COMPILE compile PARENT_SCOPE)
  elseif(NOT "$ENV{MAX_JOBS}" STREQUAL "")
    message(FATAL_ERROR "MAX_JOBS=$ENV{MAX_JOBS} is no number of compilers: give 1 or more, or unset it")
  endif()
endfunction()

# _engine: page allocator, prefix tree, scheduler. No device code.
function(batchinfer_add_engine)
  file(GLOB sources CONFIGURE_DEPENDS csrc/engine/*.cpp)
  add_library(batchinfer_engine STATIC ${sources})
  target_include_directories(batchinfer_engine PUBLIC csrc)
  target_compile_options(batchinfer_engine PRIVATE -Wall -Wextra)
  pybind11_add_module(_engine csrc/bindings/engine.cpp)
  target_link_libraries(_engine PRIVATE batchinfer_engine)
  install(TARGETS _engine LIBRARY DESTINATION batchinfer)
endfunction()

# _process: what happens where a library ends the process.
function(batchinfer_add_process)
  pybind11_add_module(_process csrc/bindings/process.cpp)
  target_compile_options(_process PRIVATE -Wall -Wextra)
  install(TARGETS _process LIBRARY DESTINATION batchinfer)
endfunction()
